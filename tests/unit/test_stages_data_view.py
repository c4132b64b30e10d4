"""Boxes, and images and labels cut and resized to a view."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.view import Box, Resample, view_image, view_label, whole_image_box

SIDE = st.integers(1, 3000)


@given(height=SIDE, width=SIDE, rows=SIDE, columns=SIDE)
def test_box_is_inside_centred_maximal_and_of_the_right_shape(
    height: int, width: int, rows: int, columns: int
) -> None:
    box = whole_image_box(height, width, (rows, columns))
    assert box.top >= 0
    assert box.left >= 0
    assert box.height >= 1
    assert box.width >= 1
    bottom, right = height - box.top - box.height, width - box.left - box.width
    assert 0 <= bottom - box.top <= 1
    assert 0 <= right - box.left <= 1
    assert box.height == height or box.width == width
    if box.width == width:
        assert abs(box.height - width * rows / columns) <= 0.5 or box.height in (1, height)
    if box.height == height:
        assert abs(box.width - height * columns / rows) <= 0.5 or box.width in (1, width)
    if height * columns == width * rows:
        assert (box.height, box.width) == (height, width)


def test_box_of_a_nyud_frame() -> None:
    expected = Box(top=0, left=11, height=480, width=617)
    assert whole_image_box(480, 640, (448, 576)) == expected


def test_view_of_the_boxs_own_size_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    box = Box(top=1, left=2, height=5, width=6)
    assert np.array_equal(view_image(image, box, (5, 6)), image[1:6, 2:8])
    for task, label in {
        "segmentation": rng.integers(0, 40, (7, 9)),
        "normals": rng.random((7, 9, 3), dtype=np.float32),
        "boundary": rng.choice(np.array([0, 1, 255], np.float32), (7, 9)),
        "depth": rng.random((7, 9), dtype=np.float32),
    }.items():
        view = view_label(task, label, box, (5, 6))
        assert np.array_equal(view, label[1:6, 2:8])
        assert view.dtype == label.dtype


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_downscaling_is_antialiased_and_ignores_what_is_outside(resample: Resample) -> None:
    image = np.zeros((40, 44, 3), np.uint8)
    image[:, ::2] = 255  # stripes of one pixel
    image[:, :4] = 255  # outside the box
    view = view_image(image, Box(top=0, left=4, height=40, width=40), (10, 10), resample)
    assert view.shape == (10, 10, 3)
    assert np.abs(view[2:-2, 2:-2].astype(int) - 127).max() < 12
    assert view[:, 0].mean() < 180


def test_labels_are_never_mixed() -> None:
    label = np.random.default_rng(0).choice([0, 7, 255], (33, 47))
    box = Box(top=0, left=1, height=33, width=44)
    for size in ((12, 16), (66, 88), (40, 16)):
        assert set(np.unique(view_label("segmentation", label, box, size))) <= {0, 7, 255}
    halved = view_label("depth", np.arange(64.0).reshape(8, 8), _whole(8, 8), (4, 4))
    assert np.array_equal(halved, np.arange(64.0).reshape(8, 8)[1::2, 1::2])


def _whole(height: int, width: int) -> Box:
    return Box(top=0, left=0, height=height, width=width)


@given(column=st.integers(0, 39), height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_thin_boundary_never_tears_nor_thickens_when_it_shrinks(
    column: int, height: int, width: int
) -> None:
    label = np.zeros((40, 40), np.float32)
    label[:, column] = 1
    view = view_label("boundary", label, _whole(40, 40), (height, width))
    assert view.shape == (height, width)
    assert view.dtype == np.float32
    assert (view.sum(axis=1) == 1).all()


@given(
    label=st.lists(st.sampled_from([0.0, 1.0, 255.0]), min_size=4, max_size=12),
    target=st.integers(1, 20),
)
def test_boundary_values_by_definition(label: list[float], target: int) -> None:
    view = view_label("boundary", np.array([label], np.float32), _whole(1, len(label)), (1, target))
    if target > len(label):
        cells = [[label[(2 * i + 1) * len(label) // (2 * target)]] for i in range(target)]
    else:
        cells = [[] for _ in range(target)]
        for index, value in enumerate(label):
            cells[(2 * index + 1) * target // (2 * len(label))].append(value)
    expected = [1 if 1 in cell else max(cell) for cell in cells]
    assert view[0].tolist() == expected


def test_a_box_outside_the_image_is_refused() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    for box in (Box(top=1, left=0, height=4, width=5), Box(top=0, left=-1, height=2, width=2)):
        with pytest.raises(ValueError, match="does not lie inside an image of 4 x 5"):
            view_image(image, box, (2, 2))
