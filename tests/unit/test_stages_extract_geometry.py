import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.errors import TeacherError
from stages.extract.geometry import InputFrame, plan_input
from stages.extract.levels import choose_taps, level_names

SIDES = st.integers(1, 2000)
PYRAMID = (4, 8, 16, 32)


@pytest.mark.parametrize(
    ("view", "multiple", "expected"),
    [
        ((448, 576), 16, (448, 576)),
        ((448, 576), 14, (448, 574)),
        ((96, 128), 14, (98, 126)),
        ((5, 40), 16, (16, 48)),
    ],
)
def test_a_view_becomes_the_nearest_multiple_of_the_patch(
    view: tuple[int, int], multiple: int, expected: tuple[int, int]
) -> None:
    frame = plan_input("view", view, (224, 224), multiple)
    assert frame == InputFrame(size=expected, content=expected)


def test_an_explicit_size_is_rounded_likewise() -> None:
    assert plan_input((100, 200), (448, 576), (224, 224), 16).size == (96, 208)


@pytest.mark.parametrize(
    ("view", "content", "cells"),
    [
        ((480, 640), (768, 1024), (48, 64)),
        ((640, 480), (1024, 768), (64, 48)),
        ((448, 576), (800, 1024), (50, 64)),  # 796.4 rows would end amid a cell
        ((512, 512), (1024, 1024), (64, 64)),
        ((1, 2000), (16, 1024), (1, 64)),
    ],
)
def test_the_native_size_keeps_the_aspect_ratio_and_loses_the_padding(
    view: tuple[int, int], content: tuple[int, int], cells: tuple[int, int]
) -> None:
    frame = plan_input("native", view, (1024, 1024), 16)
    assert frame.size == (1024, 1024)
    assert frame.content == content
    assert frame.cells((64, 64)) == cells


def test_a_native_size_that_is_no_multiple_is_rounded() -> None:
    assert plan_input("native", (300, 300), (384, 384), 14).size == (378, 378)


@given(view=st.tuples(SIDES, SIDES), native=st.tuples(SIDES, SIDES), multiple=st.integers(1, 64))
def test_a_letterbox_fills_one_side_with_whole_cells(
    view: tuple[int, int], native: tuple[int, int], multiple: int
) -> None:
    frame = plan_input("native", view, native, multiple)
    assert any(kept == full for kept, full in zip(frame.content, frame.size, strict=True))
    for kept, full in zip(frame.content, frame.size, strict=True):
        assert 0 < kept <= full
        assert kept % multiple == full % multiple == 0
    grid = tuple(full // multiple for full in frame.size)
    assert frame.cells((grid[0], grid[1])) == tuple(kept // multiple for kept in frame.content)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31)), (4, (0, 1, 2, 3))],
)
def test_four_levels_of_a_transformer_are_those_of_the_paper(
    blocks: int, expected: tuple[int, ...]
) -> None:
    assert choose_taps(4, (16,) * blocks) == expected


def test_levels_of_a_hierarchical_network_are_its_last_stages() -> None:
    assert choose_taps(4, (2, *PYRAMID)) == (1, 2, 3, 4)
    assert choose_taps(1, PYRAMID) == (3,)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (5, "5 asked for, but the model has 4 stages"),
        (0, "0 asked for"),
        ((0, 4), r"stages are numbered 0 to 3, got \[0, 4\]"),
        ((-1,), "numbered 0 to 3"),
        ((2, 1), "ascending"),
        ((1, 1), "ascending and differ"),
        ((), "numbered 0 to 3"),
    ],
)
def test_impossible_levels_are_refused_with_the_valid_range(
    levels: int | tuple[int, ...], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        choose_taps(levels, PYRAMID)


def test_levels_are_named_by_index() -> None:
    assert level_names((2, 11), (16,) * 12) == ("block_02", "block_11")
    assert level_names((0, 3), PYRAMID) == ("stage_0", "stage_3")
