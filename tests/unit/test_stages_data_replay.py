"""A view does the same to an image and to its labels, whoever replays it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from stages.data.photometric import Photometric, change_colours
from stages.data.view import (
    Box,
    View,
    cut_view,
    part_of,
    replay_label,
    view_image,
    view_label,
    whole,
    whole_image_box,
    zoom,
)

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(0, 256, (40, 50, 3), np.uint8)
SIZE = (24, 32)


@st.composite
def views(draw: st.DrawFn, height: int = 40, width: int = 50) -> View:
    rows, columns = draw(st.integers(8, height)), draw(st.integers(8, width))
    box = Box(
        top=draw(st.integers(0, height - rows)),
        left=draw(st.integers(0, width - columns)),
        height=rows,
        width=columns,
    )
    return View(box=box, flip=draw(st.booleans()))


@given(view=views(), row=st.integers(0, 39), column=st.integers(0, 49))
def test_a_marker_is_at_the_same_place_in_image_and_labels(
    view: View, row: int, column: int
) -> None:
    """At the size of the box nothing is resampled, so the places are exact."""
    size = view.box.height, view.box.width
    image, marks = np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.float32)
    image[row, column], marks[row, column] = 255, 1
    pixels = cut_view(image, view)
    shown = view_image(pixels, whole(pixels), size)[..., 0] == 255
    assert shown.sum() == (
        view.box.top <= row < view.box.top + view.box.height
        and view.box.left <= column < view.box.left + view.box.width
    )
    for task in ("segmentation", "boundary", "depth"):
        assert np.array_equal(replay_label(task, marks, view, size) == 1, shown), task


@given(view=views())
def test_a_marker_of_several_pixels_stays_put_when_it_is_resized(view: View) -> None:
    image, marks = np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.int64)
    box = view.box
    top, left = box.top + box.height // 4, box.left + box.width // 8
    place = slice(top, top + box.height // 4 + 1), slice(left, left + box.width // 4 + 1)
    image[place], marks[place] = 255, 1
    pixels = cut_view(image, view)
    shown = view_image(pixels, whole(pixels), SIZE)[..., 0] / 255
    label = replay_label("segmentation", marks, view, SIZE)
    for axis in (0, 1):  # centres of mass, in pixels of the view
        centres = [
            (part.sum(axis=1 - axis) * np.arange(SIZE[axis])).sum() / part.sum()
            for part in (shown, label)
        ]
        assert abs(centres[0] - centres[1]) < max(1, SIZE[axis] / (box.height, box.width)[axis])


@given(view=views(), data=st.data())
def test_a_part_of_a_view_is_what_cutting_twice_shows(view: View, data: st.DataObject) -> None:
    part = data.draw(views(view.box.height, view.box.width))
    np.testing.assert_array_equal(
        cut_view(IMAGE, part_of(view, part)), cut_view(cut_view(IMAGE, view), part)
    )


def test_a_view_without_changes_is_what_it_was() -> None:
    box = whole_image_box(40, 50, SIZE)
    pixels = cut_view(IMAGE, View(box=box))
    np.testing.assert_array_equal(
        view_image(pixels, whole(pixels), SIZE), view_image(IMAGE, box, SIZE)
    )
    label = GENERATOR.integers(0, 9, (40, 50))
    np.testing.assert_array_equal(
        replay_label("segmentation", label, View(box=box), SIZE),
        view_label("segmentation", label, box, SIZE),
    )


@pytest.mark.parametrize("task", ["segmentation", "boundary", "depth"])
@pytest.mark.parametrize("source", [(40, 50), (17, 23), (24, 32)])
def test_a_mirrored_label_is_the_label_of_the_mirrored_image(
    task: str, source: tuple[int, int]
) -> None:
    label = GENERATOR.integers(0, 2, source).astype(np.float32)
    box = Box(top=2, left=3, height=source[0] - 4, width=source[1] - 5)
    seen_in_a_mirror = Box(top=2, left=2, height=source[0] - 4, width=source[1] - 5)
    np.testing.assert_array_equal(
        replay_label(task, label, View(box=box, flip=True), SIZE),
        replay_label(task, label[:, ::-1], View(box=seen_in_a_mirror), SIZE),
    )


def test_normals_of_a_mirrored_view_point_the_other_way() -> None:
    normals = GENERATOR.normal(size=(40, 50, 3)).astype(np.float32)
    normals[0, 0] = 0  # unknown
    flipped = View(box=whole(normals), flip=True)
    shown = replay_label("normals", normals, flipped, (40, 50))
    np.testing.assert_array_equal(shown[..., 0], 0 - normals[:, ::-1, 0])
    np.testing.assert_array_equal(shown[..., 1:], normals[:, ::-1, 1:])
    assert not shown[0, -1].any()
    assert not np.signbit(shown[0, -1]).any()
    assert shown.dtype == np.float32


def test_depth_is_metric_or_divided_by_the_zoom() -> None:
    depth = np.full((48, 64), 3, np.float32)
    depth[0, 0] = 0  # unknown
    quarter = View(box=Box(top=0, left=0, height=24, width=32))
    assert zoom(quarter.box, 48, 64, SIZE) == 2
    assert zoom(whole_image_box(48, 80, SIZE), 48, 80, SIZE) == 1
    near = replay_label("depth", depth, quarter, SIZE, "scaled")
    assert (near[0, 0], near[1, 1], near.dtype) == (0, 1.5, np.float32)
    assert replay_label("depth", depth, quarter, SIZE)[1, 1] == 3
    whole_view = View(box=whole(depth))
    assert replay_label("depth", depth, whole_view, SIZE, "scaled")[1, 1] == 3


def solid(red: int, green: int, blue: int) -> NDArray[np.uint8]:
    return np.tile(np.array([red, green, blue], np.uint8), (2, 3, 1))


def test_colours_change_as_they_are_called() -> None:
    np.testing.assert_array_equal(
        change_colours(solid(200, 100, 50), Photometric(brightness=0.5)), solid(100, 50, 25)
    )
    np.testing.assert_array_equal(
        change_colours(solid(200, 100, 50), Photometric(brightness=2.0)), solid(255, 200, 100)
    )
    grey = change_colours(solid(200, 100, 50), Photometric(saturation=0.0))
    assert len(np.unique(grey)) == 1
    halves = np.concatenate([solid(0, 0, 0), solid(100, 100, 100)])
    flat = change_colours(halves, Photometric(contrast=0.0))
    np.testing.assert_array_equal(flat, np.full_like(flat, 50))
    turned = change_colours(solid(255, 0, 0), Photometric(hue=1 / 3))  # red becomes green
    assert turned[0, 0, 1] == 255
    assert turned[0, 0, 0] < 10
    assert turned[0, 0, 2] < 10
    back = change_colours(solid(255, 0, 0), Photometric(hue=-1 / 3))
    assert back[0, 0, 2] == 255


def test_neutral_factors_keep_every_byte() -> None:
    np.testing.assert_array_equal(change_colours(IMAGE, Photometric()), IMAGE)
    np.testing.assert_array_equal(change_colours(IMAGE, Photometric(hue=0.001)), IMAGE)


def test_colours_are_those_of_torchvision_on_pillow_images() -> None:
    from torchvision.transforms import functional

    box = Box(top=3, left=4, height=20, width=30)
    factors = Photometric(brightness=1.2, contrast=0.7, saturation=1.4, hue=0.1)
    expected = Image.fromarray(np.ascontiguousarray(IMAGE[3:23, 4:34][:, ::-1]))
    for change, factor in (
        (functional.adjust_brightness, 1.2),
        (functional.adjust_contrast, 0.7),
        (functional.adjust_saturation, 1.4),
    ):
        expected = change(expected, factor)
    hue = functional.adjust_hue(expected, 26 / 255)  # it truncates steps of 1/255, we round 1/256
    pixels = cut_view(IMAGE, View(box=box, flip=True, photometric=factors))
    np.testing.assert_array_equal(pixels, np.array(hue))


def test_a_view_outside_its_image_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie inside an image of 40 x 50"):
        cut_view(IMAGE, View(box=Box(top=0, left=20, height=40, width=40), flip=True))
