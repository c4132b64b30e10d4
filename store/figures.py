"""Small tables of figures that were measured of a teacher, a line per level, beside its features.

Two arrays lie at `<teacher>/<folder>`: the figures (level x column, in the order of the teacher's
levels and of the columns, which its attributes name) and `images`, how many images they are of.
They are optional, no part of the fingerprint, and written before any row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.chunks import read_array, write_array
from store.documents import check_document, write_document
from store.errors import StoreDamagedError
from store.files import remove_tree
from store.layout import METADATA, ArrayLayout, group_document, table_layout
from store.remote import StorePath
from store.spec import TeacherSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureTable:
    """Where a table lies: its folder, its array with `axis` and `columns`; `says` what it is for.

    `largest` bounds what a figure can be.
    """

    folder: str
    array: str
    axis: str
    columns: tuple[str, ...]
    largest: tuple[float, ...]
    says: str

    def write(
        self, folder: StorePath, spec: TeacherSpec, figures: NDArray[np.float64], images: int
    ) -> None:
        """Place a teacher's figures (levels, columns); only the holder of its lock may."""
        values = {self.array: figures.astype("<f8"), "images": np.array(images, "<i8")}
        for name, layout in self.layouts(spec).items():
            write_array(folder, layout, values[name])
        write_document(folder / self.folder / METADATA, group_document({}))  # the last: it is there

    def exists(self, folder: StorePath) -> bool:
        """Return whether a teacher's figures were measured, and all of them written."""
        return (folder / self.folder / METADATA).exists()

    def remove(self, folder: StorePath) -> None:
        """Remove a teacher's figures; only the holder of its lock may."""
        remove_tree(folder / self.folder)

    def read(
        self, folder: StorePath, spec: TeacherSpec
    ) -> tuple[dict[str, dict[str, float]], int] | None:
        """Return a teacher's figures by level and column, and the images; None if not measured.

        Raises:
            StoreDamagedError: a file is missing or damaged, or a figure is out of its bounds.
        """
        if not self.exists(folder):
            return None
        check_document(folder / self.folder / METADATA, group_document({}))
        arrays = {name: read_array(folder, layout) for name, layout in self.layouts(spec).items()}
        figures, images = arrays[self.array], int(arrays["images"])
        # NaN is not measured
        if images < 1 or (np.abs(figures) > np.array(self.largest) + 1e-6).any():
            raise StoreDamagedError(
                f"{folder / self.folder} holds figures that cannot be: {self.says}"
            )
        return {
            level.name: dict(zip(self.columns, row, strict=True))
            for level, row in zip(spec.levels, figures.tolist(), strict=True)
        }, images

    def layouts(self, spec: TeacherSpec) -> dict[str, ArrayLayout]:
        """Return the layouts of the arrays by name."""
        shape = len(spec.levels), len(self.columns)
        named = {"levels": [level.name for level in spec.levels], f"{self.axis}s": [*self.columns]}
        path = f"{self.folder}/{self.array}"
        return {
            self.array: table_layout(path, "<f8", shape, ("level", self.axis), named),
            "images": table_layout(f"{self.folder}/images", "<i8", (), ()),
        }

    def documents(self, spec: TeacherSpec) -> dict[str, dict[str, Any]]:
        """Return each metadata file by its path below the teacher."""
        return {
            f"{self.folder}/{METADATA}": group_document({}),
            **{f"{one.path}/{METADATA}": one.document() for one in self.layouts(spec).values()},
        }

    def rows(
        self, spec: TeacherSpec, figures: Mapping[str, Mapping[str, float]]
    ) -> NDArray[np.float64]:
        """Return figures by level and column as an array (levels, columns)."""
        return np.array(
            [[figures[level.name][name] for name in self.columns] for level in spec.levels]
        )
