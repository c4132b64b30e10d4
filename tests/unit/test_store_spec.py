"""Names, digests and tables: what a store says it holds."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from store.errors import StoreError, StoreFormatError, difference, nearest
from store.images import ImageTable, ViewTable
from store.spec import LevelSpec, TeacherSpec
from store.testing import sample_images, sample_teacher, sample_views

IMAGES = sample_images(3)


def reordered(table: ImageTable, order: list[int]) -> ImageTable:
    columns = {f.name: tuple(getattr(table, f.name)[i] for i in order) for f in fields(table)}
    return ImageTable(**columns)


def test_image_digest_is_sensitive_to_order() -> None:
    assert IMAGES.digest() == sample_images(3).digest()
    assert IMAGES.digest() != reordered(IMAGES, [1, 0, 2]).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ("a", "b", "c")},
        {"sha256": ("", "", "")},
        {"heights": (480, 480, 481)},
        {"widths": (639, 640, 640)},
        {"statuses": ("ok", "ok", "truncated")},
    ],
)
def test_image_digest_is_sensitive_to_every_column(change: dict[str, Any]) -> None:
    assert replace(IMAGES, **change).digest() != IMAGES.digest()


def test_image_digest_does_not_run_neighbours_together() -> None:
    first = replace(IMAGES, ids=("ab", "c", "d"))
    assert first.digest() != replace(IMAGES, ids=("a", "bc", "d")).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ("a", "a", "b")}, "'a' occurs more than once"),
        ({"ids": ("a", "", "b")}, "non-empty"),
        ({"ids": ("a", "b\0", "c")}, "non-empty"),
        ({"sha256": ("xyz", "", "")}, "64 lower-case hex"),
        ({"heights": (1, 2)}, "equal, non-empty columns"),
        ({f.name: () for f in fields(IMAGES)}, "equal, non-empty columns"),
    ],
)
def test_bad_image_table_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        replace(IMAGES, **change)


def test_view_digest_is_sensitive_to_every_column() -> None:
    views = sample_views(4)
    changed = [
        replace(views, image_size=(32, 24)),
        replace(views, views_per_image=2),
        replace(views, boxes=views.boxes + 1),
        replace(views, flips=~views.flips),
        replace(views, seeds=views.seeds + 1),
        sample_views(3),
    ]
    assert len({view.digest() for view in [views, *changed]}) == 7
    assert views == sample_views(4)
    assert views != changed[0]


def test_views_of_other_lengths_are_refused() -> None:
    with pytest.raises(StoreError, match=r"boxes \(rows, 4\)"):
        ViewTable(image_size=(4, 4), boxes=np.zeros((2, 4)), flips=np.zeros(3), seeds=np.zeros(3))
    with pytest.raises(StoreError, match="3 rows are no multiple of 2 views"):
        sample_views(3, views_per_image=2)


@pytest.mark.parametrize("name", ["images", "views", "zarr.json", "", "../up", "a/b", ".hidden"])
def test_teacher_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match="cannot be the name of a teacher"):
        sample_teacher(name)


@pytest.mark.parametrize("name", ["global", "valid", "commit", "a/b", ".."])
def test_level_names_that_clash_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match="cannot be the name of a level"):
        LevelSpec(name=name, grid=(1, 1), channels=1)


def test_levels_must_differ_and_have_extent() -> None:
    level = LevelSpec(name="block_02", grid=(2, 2), channels=3)
    with pytest.raises(StoreError, match="levels of different names"):
        TeacherSpec(name="t", levels=(level, level), provenance={})
    with pytest.raises(StoreError, match="at least 1, got 0"):
        LevelSpec(name="block_02", grid=(0, 2), channels=3)


def test_teacher_survives_its_attributes() -> None:
    spec = sample_teacher(input_size=(24, 32), nested={"mean": [0.1, 0.2]})
    back = TeacherSpec.from_attributes(spec.to_attributes())
    assert back == spec
    assert back.fingerprint() == spec.fingerprint()


def test_fingerprint_follows_name_levels_and_provenance() -> None:
    spec = sample_teacher()
    others = [
        sample_teacher("other", model="small"),
        sample_teacher(weights_sha256="cd" * 32),
        replace(spec, levels=spec.levels[::-1]),
        replace(spec, global_channels=None),
    ]
    assert spec.fingerprint() not in {other.fingerprint() for other in others}


def test_provenance_must_be_json() -> None:
    with pytest.raises(StoreError, match="plain JSON"):
        sample_teacher(weights=object())
    with pytest.raises(StoreError, match="plain JSON"):
        sample_teacher(scale=float("nan"))


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"levels": "block"},
        {"levels": [{"name": "a", "grid": [1, 2, 3], "channels": 1}]},
        {"levels": [{"name": "a", "grid": [1, "2"], "channels": 1}]},
        {"levels": [{"name": "../a", "grid": [1, 2], "channels": 1}]},
        {"global_channels": 2.5},
        {"provenance": None},
    ],
)
def test_hostile_attributes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StoreFormatError, match="describe no teacher"):
        TeacherSpec.from_attributes({**sample_teacher().to_attributes(), **change})


def test_hint_names_the_nearest() -> None:
    assert nearest("block_2", ["block_02", "stage_1"]) == "did you mean 'block_02'?"
    assert nearest("zzz", ["b", "a"]) == "known: 'a', 'b'"
    assert nearest("zzz", []) == "there are none"
    assert nearest("zzz", [str(i) for i in range(9)], limit=5) == "9 are known"


def test_difference_names_every_path() -> None:
    stored = {"a": 1, "b": {"c": [1], "d": 2}}
    asked = {"a": 1, "b": {"c": [2], "e": 3}}
    assert difference(stored, asked) == [
        "  b.c: store has [1], asked for [2]",
        "  b.d: store has 2, asked for '(absent)'",
        "  b.e: store has '(absent)', asked for 3",
    ]
