"""How far a teacher's grid follows its image when that is mirrored, cut or enlarged.

Two small arrays lie at `<teacher>/equivariance`: `cosine` (level x transform, in the order of the
teacher's levels and of `TRANSFORMS`, which its attributes name) and `images`, how many images it
is the mean over. They are optional, no part of the fingerprint, and written before any row.
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
from store.spec import EQUIVARIANCE, TeacherSpec

TRANSFORMS = ("flip", "crop", "scale")
"""Mirrored left to right; cut at its own scale; a part enlarged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivariance:
    """Mean cosine over tokens of the changed grid with the answer to the changed image.

    `cosine` maps a level to each transform's figure, NaN where its grid is too small to tell.
    """

    images: int
    cosine: Mapping[str, Mapping[str, float]]


def write_equivariance(folder: StorePath, spec: TeacherSpec, measured: Equivariance) -> None:
    """Place a teacher's figures; only the holder of its lock may."""
    figures = [[measured.cosine[level.name][name] for name in TRANSFORMS] for level in spec.levels]
    values: dict[str, NDArray[Any]] = {
        "cosine": np.array(figures, "<f8"),
        "images": np.array(measured.images, "<i8"),
    }
    for name, layout in equivariance_layouts(spec).items():
        write_array(folder, layout, values[name])
    write_document(folder / EQUIVARIANCE / METADATA, group_document({}))  # the last: it is there


def has_equivariance(folder: StorePath) -> bool:
    """Return whether a teacher's figures were measured, and all of them written."""
    return (folder / EQUIVARIANCE / METADATA).exists()


def remove_equivariance(folder: StorePath) -> None:
    """Remove a teacher's figures; only the holder of its lock may."""
    remove_tree(folder / EQUIVARIANCE)


def read_equivariance(folder: StorePath, spec: TeacherSpec) -> Equivariance | None:
    """Return a teacher's figures, None where they were not measured.

    Raises:
        StoreDamagedError: a file is missing or damaged, or a figure is no cosine.
    """
    if not has_equivariance(folder):
        return None
    check_document(folder / EQUIVARIANCE / METADATA, group_document({}))
    arrays = {
        name: read_array(folder, layout) for name, layout in equivariance_layouts(spec).items()
    }
    figures, images = arrays["cosine"], int(arrays["images"])
    if images < 1 or (np.abs(figures) > 1 + 1e-6).any():  # NaN is not measured
        raise StoreDamagedError(f"{folder / EQUIVARIANCE} holds what is no mean cosine of images")
    return Equivariance(
        images=images,
        cosine={
            level.name: dict(zip(TRANSFORMS, row, strict=True))
            for level, row in zip(spec.levels, figures.tolist(), strict=True)
        },
    )


def equivariance_layouts(spec: TeacherSpec) -> dict[str, ArrayLayout]:
    """Return the layouts of the arrays by name."""
    shape = len(spec.levels), len(TRANSFORMS)
    return {
        "cosine": table_layout(
            f"{EQUIVARIANCE}/cosine",
            "<f8",
            shape,
            ("level", "transform"),
            {"levels": [level.name for level in spec.levels], "transforms": list(TRANSFORMS)},
        ),
        "images": table_layout(f"{EQUIVARIANCE}/images", "<i8", (), ()),
    }


def equivariance_documents(spec: TeacherSpec) -> dict[str, dict[str, Any]]:
    """Return each metadata file by its path below the teacher."""
    layouts = equivariance_layouts(spec).values()
    return {
        f"{EQUIVARIANCE}/{METADATA}": group_document({}),
        **{f"{layout.path}/{METADATA}": layout.document() for layout in layouts},
    }
