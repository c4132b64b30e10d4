"""The arrays below a teacher's folder, all derived from its description."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from store.codecs import FLOATS
from store.layout import DATA_TYPES, METADATA, ArrayLayout, group_document, table_layout
from store.spec import GLOBAL, Target, TeacherSpec

MAX_ROWS_PER_SHARD = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodec:
    """What a teacher's description says of a fitted codec: enough to know every array's extents.

    `row_shape` and `dtype` are those of stored rows; `parameters` gives (dtype, shape) of each
    array that belongs to the codec, `digest` is the SHA-256 of them all.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    parameters: Mapping[str, tuple[str, tuple[int, ...]]]
    digest: str

    def to_attributes(self) -> dict[str, Any]:
        """Return the description as plain JSON values."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "row_shape": list(self.row_shape),
            "parameters": {key: [kind, list(shape)] for key, (kind, shape) in
                           self.parameters.items()},
            "digest": self.digest,
        }  # fmt: skip

    @classmethod
    def from_attributes(cls, attributes: Any) -> "StoredCodec":
        """Return the description that `to_attributes` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            name=str(attributes["name"]),
            dtype=str(attributes["dtype"]),
            row_shape=_shape(attributes["row_shape"]),
            parameters={
                str(key): (_dtype(kind), _shape(shape))
                for key, (kind, shape) in attributes["parameters"].items()
            },
            digest=str(attributes["digest"]),
        )


def _shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(side) is int and side > 0 for side in values):
        raise TypeError(f"expected a list of whole numbers of at least 1, got {values!r:.80}")
    return tuple(values)


def _dtype(value: Any) -> str:
    if value not in DATA_TYPES:
        raise ValueError(f"expected one of {', '.join(DATA_TYPES)}, got {value!r:.80}")
    return str(value)


def codec_folder(target: Target) -> str:
    """Return where a target's codec lies, relative to the teacher."""
    return f"{target.level}/codec/{target.resolution}"


def codec_layouts(target: Target, stored: StoredCodec) -> dict[str, ArrayLayout]:
    """Return the layouts of a codec's arrays by name."""
    return {
        name: table_layout(
            f"{codec_folder(target)}/{name}",
            dtype,
            shape,
            tuple(f"{name}_{axis}" for axis in range(len(shape))),
        )
        for name, (dtype, shape) in stored.parameters.items()
    }


def with_rows_per_shard(layout: "TeacherLayout", shard_bytes: int) -> "TeacherLayout":
    """Return the layout cut so that shards of a teacher's arrays have `shard_bytes` on average.

    All arrays are cut at the same rows, so this, and not the largest array, decides how many files
    a store has.
    """
    sizes = [array.row_bytes for array in layout.features().values()]
    rows = max(1, min(MAX_ROWS_PER_SHARD, shard_bytes * len(sizes) // sum(sizes)))
    return replace(layout, rows_per_shard=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLayout:
    """Every array below a teacher's folder."""

    spec: TeacherSpec
    rows: int
    rows_per_shard: int
    covariance: bool = False
    codecs: Mapping[str, StoredCodec] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards of every array of the teacher."""
        return math.ceil(self.rows / self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def features(self) -> dict[str, ArrayLayout]:
        """Return the feature arrays by target name, `global` last where there is a pooled output."""
        arrays = {target.name: self._target(target) for target in self.spec.targets}
        if self.spec.global_channels is not None:
            dtype = FLOATS.get(self.spec.codec, "<f2")
            row = (self.spec.global_channels,)
            arrays[GLOBAL] = self._feature(GLOBAL, dtype, row, ("channel",))
        return arrays

    def _target(self, target: Target) -> ArrayLayout:
        stored = self.codecs.get(target.name)
        row: tuple[int, ...] = (*target.grid, target.channels)
        # Names of their own, for xarray allows one length per name in a group.
        own = "" if target.resolution == "native" else f"_{target.resolution}"
        axes = f"y{own}", f"x{own}"
        if stored is None:
            return self._feature(target.name, FLOATS[self.spec.codec], row, (*axes, "channel"))
        last = "channel" if stored.row_shape == row else f"code{own}"
        return self._feature(target.name, stored.dtype, stored.row_shape, (*axes, last))

    def _feature(
        self, path: str, dtype: str, row_shape: tuple[int, ...], dimensions: tuple[str, ...]
    ) -> ArrayLayout:
        return ArrayLayout(
            path=path,
            dtype=dtype,
            shape=(self.rows, *row_shape),
            chunk=(self.rows_per_shard, *row_shape),
            dimensions=("row", *dimensions),
            row_chunks=True,
        )

    def valid(self) -> ArrayLayout:
        """Return the layout of the row marks, whose chunks are the commit marks."""
        return ArrayLayout(
            path="valid",
            dtype="|u1",
            shape=(self.rows,),
            chunk=(self.rows_per_shard,),
            dimensions=("row",),
        )

    def digests(self) -> ArrayLayout:
        """Return the layout of the SHA-256 of each shard file, arrays in the order of features."""
        entry = (len(self.features()), 32)
        return ArrayLayout(
            path="commit/digest",
            dtype="|u1",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "array", "byte"),
        )

    def moments(self) -> ArrayLayout:
        """Return the layout of count, mean and M2 of each shard, targets' channels in a line."""
        entry = (3, sum(target.channels for target in self.spec.targets))
        return ArrayLayout(
            path="commit/statistics",
            dtype="<f8",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "moment", "channel"),
        )

    def comoments(self) -> ArrayLayout:
        """Return the layout of the co-moments of each shard, where the covariance was asked for.

        Targets follow each other in a line, of each the lower triangle by rows: C (C + 1) / 2
        float64, which is 2.4 MB per target and shard for C = 768.
        """
        entry = (sum(target.channels * (target.channels + 1) // 2 for target in self.spec.targets),)
        return ArrayLayout(
            path="commit/covariance",
            dtype="<f8",
            shape=(self.shards, *entry),
            chunk=(1, *entry),
            dimensions=("shard", "entry"),
        )

    def commits(self) -> list[ArrayLayout]:
        """Return the arrays that have a checksummed file per shard, the commit marks aside."""
        always = [self.digests(), self.moments()]
        return [*always, self.comoments()] if self.covariance else always

    def statistics(self, target: Target) -> dict[str, ArrayLayout]:
        """Return the layouts of a target's mean, variance, count, and covariance if asked for."""
        size, folder = target.channels, f"{target.level}/stats/{target.resolution}"
        arrays = {
            "mean": table_layout(f"{folder}/mean", "<f8", (size,), ("channel",)),
            "variance": table_layout(f"{folder}/variance", "<f8", (size,), ("channel",)),
            "count": table_layout(f"{folder}/count", "<i8", (), ()),
        }
        if self.covariance:
            arrays["covariance"] = table_layout(
                f"{folder}/covariance", "<f8", (size, size), ("channel", "other_channel")
            )
        return arrays

    def documents(self) -> dict[str, dict[str, Any]]:
        """Return each metadata file below the teacher's own, but for the finished statistics."""
        groups = ["commit", *(level.name for level in self.spec.levels)]
        arrays = [*self.features().values(), self.valid(), *self.commits()]
        for target in self.spec.targets:
            if target.name in self.codecs:
                groups += [f"{target.level}/codec", codec_folder(target)]
                arrays += codec_layouts(target, self.codecs[target.name]).values()
        return _documents(groups, arrays)

    def statistics_documents(self) -> dict[str, dict[str, Any]]:
        """Return the metadata files that are added when the teacher is finished."""
        groups = [f"{level.name}/stats" for level in self.spec.levels]
        groups += [f"{target.level}/stats/{target.resolution}" for target in self.spec.targets]
        arrays = [
            array for target in self.spec.targets for array in self.statistics(target).values()
        ]
        return _documents(groups, arrays)


def _documents(groups: list[str], arrays: list[ArrayLayout]) -> dict[str, dict[str, Any]]:
    return {
        **{f"{group}/{METADATA}": group_document({}) for group in groups},
        **{f"{array.path}/{METADATA}": array.document() for array in arrays},
    }
