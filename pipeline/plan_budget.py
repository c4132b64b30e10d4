"""Which codec and resolution each teacher gets within a budget of bytes: pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dask.utils import parse_bytes

from pipeline.errors import StepError
from store.spec import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to store a teacher: its bytes, and the cosine lost at its worst level.

    `limit` is the largest grid that is stored, None for those of the parameter file.
    """

    codec: str
    limit: Grid | None
    bytes: int
    loss: float


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option] | None:
    """Return an option per teacher that together take at most `budget` bytes, None if none do.

    Each teacher begins with what loses least (of equals, the smallest). While that is too much,
    the replacement that loses least cosine per byte saved is made, over all teachers: the steps
    go down the lower convex hulls of the options (Shoham and Gersho 1988, "Efficient bit
    allocation for an arbitrary set of quantizers"). So nothing is chosen that another option of
    the same teacher beats in both, and less budget only ever goes further down the same steps.
    """
    chosen = {
        name: min(every, key=lambda one: (one.loss, one.bytes)) for name, every in options.items()
    }
    while sum(one.bytes for one in chosen.values()) > budget:
        steps = [
            (_price(chosen[name], one), chosen[name].bytes - one.bytes, name, one)
            for name, every in options.items()
            for one in every
            if one.bytes < chosen[name].bytes
        ]
        if not steps:
            return None
        _, _, name, better = min(steps, key=lambda step: (step[0], -step[1], step[2]))
        chosen[name] = better
    return chosen


def _price(now: Option, then: Option) -> float:
    """Return the cosine lost per byte saved."""
    return (then.loss - now.loss) / (now.bytes - then.bytes)


def smallest(options: Mapping[str, Sequence[Option]]) -> int:
    """Return the fewest bytes that all teachers together can take."""
    return sum(min(one.bytes for one in every) for every in options.values())


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `500GB`, `1.5TB` or `200GiB` says.

    Raises:
        StepError: it says none.
    """
    try:
        int(text.strip()[:1])  # dask reads "GB" as one of them, and nothing as one byte
        size = int(parse_bytes(text))
    except ValueError as error:
        raise StepError(
            f"--budget: {text!r} is no size; write a number and a unit, such as 500GB, 1.5TB or "
            "200GiB"
        ) from error
    if size < 1:
        raise StepError(f"--budget: {text!r} leaves no byte; write a size such as 500GB")
    return size
