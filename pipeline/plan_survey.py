"""What was measured for `sak plan`, and what follows from it for each teacher."""

from dataclasses import dataclass, replace

from pipeline.params import Params
from pipeline.plan_budget import Option
from pipeline.plan_costs import Comparison, Pace, one_pass
from stages.extract.measure import TeacherCost
from store import drift, equivariance
from store.calibration import Fidelity
from store.codecs import parse_codec
from store.contract import contract_of, worst
from store.disk import Disk
from store.pyramid import coarser, with_limits
from store.sizes import Size, float32_ratio, future_record, teacher_size
from store.spec import Grid
from store.teacher import TeacherRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the command line asks for; None where it says nothing.

    `budget` in bytes, prices in any currency, `images` instead of those counted, `epochs` over
    which caching is compared with online teachers.
    """

    measure_images: int
    budget: int | None = None
    price_per_gb_month: float | None = None
    price_per_hour: float | None = None
    images: int | None = None
    epochs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A teacher stored in one way: its size, what its worst target keeps, the contract."""

    record: TeacherRecord
    size: Size
    fidelity: Fidelity

    @property
    def ratio(self) -> float:
        """How many times smaller than float32 the levels are."""
        return float32_ratio(self.record)

    @property
    def meets_contract(self) -> bool:
        """Whether every level and resolution keeps what its rate class promises."""
        return contract_of(self.ratio).met_by(self.fidelity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything that was measured; `disk` is None for object storage, which is not measured."""

    params: Params
    costs: dict[str, TeacherCost]
    images: int
    tables: Size
    disk: Disk | None
    there: int
    """Bytes of these teachers that the store holds already."""
    device: str
    student_grid: Grid
    limits: tuple[Grid | None, ...]
    """The largest grids that were considered; None: those of the parameter file."""

    @property
    def rows(self) -> int:
        """Number of (image, view) pairs."""
        return self.images * self.params.views.count

    def stored(self, name: str, codec: str, limit: Grid | None = None) -> Stored:
        """Return how a teacher would lie in the store with a codec, no grid beyond `limit`."""
        cost, extract = self.costs[name], self.params.extract
        measured = [equivariance.TABLE] if extract.equivariance_images else []
        if self.params.teachers[name].precision != "fp32":
            measured.append(drift.TABLE)
        spec = replace(with_limits(cost.spec, (limit,)), codec=codec)
        fitted = cost.codecs[codec].fitted
        record = future_record(
            spec,
            fitted,
            self.rows,
            extract.shard_megabytes * 2**20,
            covariance=extract.covariance,
        )
        return Stored(
            record=record,
            size=teacher_size(record, measured),
            fidelity=worst(fitted[target.name].fidelity for target in spec.targets),
        )

    def asked(self, name: str) -> Stored:
        """Return how a teacher would lie in the store as the parameter file asks."""
        return self.stored(name, self.params.teachers[name].codec)

    def pace(self, name: str) -> Pace:
        """Return the seconds per row of what the parameter file asks."""
        cost, stored = self.costs[name], self.asked(name)
        rate = None if self.disk is None else self.disk.write_rate
        return Pace(
            decode=cost.decode_seconds,
            forward=cost.forward_seconds,
            encode=cost.codecs[stored.record.spec.codec].encode_seconds,
            write=None if rate is None else stored.size.bytes / self.rows / rate,
            overlap=self.device != "cpu",
        )

    def seconds(self, name: str) -> float:
        """Return how long a teacher's extraction takes, the rows for its codec included."""
        pace = self.pace(name)
        fitted = not parse_codec(self.params.teachers[name].codec).is_float
        extra = min(self.params.extract.calibration_images, self.rows) if fitted else 0
        forward = replace(pace, encode=0.0, write=None).seconds
        return self.rows * pace.seconds + extra * forward

    def together(self) -> float:
        """Return how long all teachers take in one pass; rows for codecs are not included."""
        paces = [self.pace(name) for name in self.costs]
        shared = [cost.shared_seconds for cost in self.costs.values()]
        return self.rows * one_pass(paces, shared)

    def total(self) -> Size:
        """Return what the whole store takes as the parameter file asks."""
        return sum((self.asked(name).size for name in self.costs), self.tables)

    def fits(self, needed: int) -> bool:
        """Return whether the disk has room for so many bytes in all; object storage always has."""
        return self.disk is None or needed - self.there <= self.disk.free_bytes

    def comparison(self, epochs: float | None) -> Comparison | None:
        """Compare with online teachers over `epochs`, or those of the phase `distill`.

        In an epoch each image shows one of its views.
        """
        if self.disk is None:
            return None
        phase = self.params.distill
        read = 0.0
        for name, cost in self.costs.items():
            record = self.asked(name).record
            arrays = record.layout.features()
            finest = [arrays[level.targets[0].name].row_bytes for level in record.spec.levels]
            read += sum(finest) / self.disk.read_rate
            read += cost.codecs[record.spec.codec].decode_seconds
        return Comparison(
            once=sum(self.seconds(name) for name in self.costs),
            cached=self.images * read,
            online=self.images * sum(cost.forward_seconds for cost in self.costs.values()),
            epochs=epochs or phase.steps * phase.batch_size / self.images,
        )

    def resolutions(self, name: str, limit: Grid | None) -> list[str | list[int]]:
        """Return a teacher's line `resolutions:` with no grid beyond `limit`."""
        asked = self.params.teachers[name].resolutions
        if limit is None:
            return [one if one == "native" else list(one) for one in asked]
        grids = {limit if one == "native" else coarser(one, limit) for one in asked}
        return [list(grid) for grid in sorted(grids, reverse=True)]

    def options(self, name: str) -> list[Option]:
        """Return every way to store a teacher that meets the contract, or loses less than one."""
        cost, found, bar = self.costs[name], [], -1.0
        for limit in self.limits:
            for codec in cost.codecs:
                stored = self.stored(name, codec, limit)
                finest = [level.targets[0] for level in stored.record.spec.levels]
                lost = [
                    1 - cost.codecs[codec].fitted[target.name].fidelity.cosine_mean
                    + cost.blur[target.name]
                    for target in finest
                ]  # fmt: skip
                loss = round(max(*lost, 0.0), 6)  # the sample tells no smaller differences apart
                found.append(Option(codec=codec, limit=limit, bytes=stored.size.bytes, loss=loss))
                if stored.meets_contract:
                    bar = max(bar, loss)
        # Smaller codecs have lower bars: one that misses its own still beats a smaller that meets.
        return [option for option in found if option.loss <= bar]


def grid_limits(student: Grid) -> tuple[Grid | None, ...]:
    """Return what a budget may choose: the grids asked for, the student's own, half of that."""
    return None, student, (max(1, student[0] // 2), max(1, student[1] // 2))
