"""Views are drawn from (seed, image id, view) alone, lie inside their image, and stay as they are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.data.config import PhotometricConfig, ViewsConfig
from stages.data.photometric import Photometric
from stages.data.view import Box, View, whole_image_box
from stages.data.views import draw_views, row_view, view_seed
from store.images import ImageTable, ViewTable

SIZE = (24, 32)
COLOURS = PhotometricConfig(brightness=0.2, contrast=0.3, saturation=0.4, hue=0.1)


def table(sizes: dict[str, tuple[int, int]]) -> ImageTable:
    return ImageTable(
        ids=tuple(sizes),
        sha256=("",) * len(sizes),
        heights=tuple(height for height, _ in sizes.values()),
        widths=tuple(width for _, width in sizes.values()),
        statuses=tuple("ok" if height else "empty" for height, _ in sizes.values()),
    )


def row(views: ViewTable, number: int) -> tuple[object, ...]:
    colours = () if views.photometric is None else tuple(views.photometric[number].tolist())
    return (
        *views.boxes[number].tolist(), bool(views.flips[number]), int(views.seeds[number]), colours
    )  # fmt: skip


SIDES = st.integers(1, 3000)
IMAGES = st.dictionaries(
    st.text("abcé/0", min_size=1), st.tuples(SIDES, SIDES), min_size=1, max_size=4
)
CONFIGS = st.builds(
    ViewsConfig,
    count=st.integers(1, 5),
    area=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: tuple(sorted(pair))),
    aspect=st.floats(1, 4),
    flip=st.floats(0, 1),
    photometric=st.none() | st.just(COLOURS),
    seed=st.integers(0, 2**63 - 1),
)


@given(sizes=IMAGES, config=CONFIGS, data=st.data())
def test_views_depend_on_seed_id_and_number_alone(
    sizes: dict[str, tuple[int, int]], config: ViewsConfig, data: st.DataObject
) -> None:
    views = draw_views(table(sizes), SIZE, config)
    assert len(views) == len(sizes) * config.count
    assert views == draw_views(table(sizes), SIZE, config)
    names = list(sizes)
    others = data.draw(st.permutations(names).map(lambda some: some[: max(1, len(some) - 1)]))
    again = draw_views(table({name: sizes[name] for name in others}), SIZE, config)
    more = draw_views(table(sizes), SIZE, config.model_copy(update={"count": config.count + 1}))
    for place, name in enumerate(others):
        for view in range(config.count):
            expected = row(views, names.index(name) * config.count + view)
            assert row(again, place * config.count + view) == expected
            assert row(more, names.index(name) * (config.count + 1) + view) == expected


@given(sizes=IMAGES, config=CONFIGS)
def test_boxes_lie_inside_their_images_and_cover_what_was_asked(
    sizes: dict[str, tuple[int, int]], config: ViewsConfig
) -> None:
    views = draw_views(table(sizes), SIZE, config)
    for index, (height, width) in enumerate(sizes.values()):
        first = whole_image_box(height, width, SIZE)
        assert row_view(views, index * config.count) == View(box=first)
        for view in range(1, config.count):
            box = row_view(views, index * config.count + view).box
            assert 0 <= box.top <= height - box.height
            assert 0 <= box.left <= width - box.width
            low, high = config.area
            stretch = np.sqrt(config.aspect)
            cuts = (box.height, first.height, height), (box.width, first.width, width)
            for side, exact, limit in cuts:
                assert 1 <= side <= max(1, np.sqrt(high) * exact * stretch + 0.51)
                assert side >= min(np.sqrt(low) * exact / stretch, limit) - 0.51


def test_flips_follow_their_probability_and_photometric_moves_nothing() -> None:
    images = table({f"{number}": (40, 50) for number in range(400)})
    drawn = ViewsConfig(count=3, seed=3, flip=0.25)
    views = draw_views(images, SIZE, drawn)
    later = views.flips.reshape(-1, 3)[:, 1:]
    assert not views.flips[::3].any()
    assert 0.2 < later.mean() < 0.3
    for share in (0.0, 1.0):
        extreme = draw_views(images, SIZE, drawn.model_copy(update={"flip": share}))
        assert (extreme.flips.reshape(-1, 3)[:, 1:] == bool(share)).all()
    coloured = draw_views(images, SIZE, drawn.model_copy(update={"photometric": COLOURS}))
    assert replace(coloured, photometric=None) == views
    assert coloured != views
    assert len(set(views.seeds.tolist())) == 1 + 800  # view 0 has seed 0


def test_colours_are_drawn_evenly_from_their_ranges() -> None:
    images = table({f"{number}": (40, 50) for number in range(300)})
    config = ViewsConfig(count=2, photometric=COLOURS)
    factors = draw_views(images, SIZE, config).photometric
    assert factors is not None
    np.testing.assert_array_equal(factors[::2], np.tile(np.float32([1, 1, 1, 0]), (300, 1)))
    for column, (middle, reach) in enumerate([(1, 0.2), (1, 0.3), (1, 0.4), (0, 0.1)]):
        drawn = (factors[1::2, column] - middle) / reach
        assert -1.001 <= drawn.min() < -0.95
        assert 0.95 < drawn.max() <= 1.001
        assert abs(drawn.mean()) < 0.1


def test_another_seed_or_name_draws_other_views() -> None:
    images, config = table({"a": (300, 400), "b": (300, 400)}), ViewsConfig(count=2)
    first = draw_views(images, SIZE, config)
    assert row(first, 1) != row(first, 3)
    other = draw_views(images, SIZE, config.model_copy(update={"seed": 1}))
    assert row(other, 1) != row(first, 1)


def test_what_was_drawn_once_is_drawn_for_ever() -> None:
    """A store grows for years: another numpy, Python or machine must draw these very views."""
    config = ViewsConfig(count=3, aspect=1.5, photometric=COLOURS, seed=2)
    views = draw_views(table({"room/é": (480, 640)}), SIZE, config)
    assert [view_seed(2, "room/é", view) for view in (1, 2)] == [
        1105826053838014143,
        6801694748039299451,
    ]
    assert views.boxes.tolist() == [[0, 0, 480, 640], [232, 155, 247, 437], [0, 70, 480, 554]]
    assert views.flips.tolist() == [False, True, False]
    assert views.digest() == "9c773e4e071812ee61ead7deb49f2365cbe9033c1078cd6d1dbbf467df1263f7"


def test_one_view_is_what_stores_had_before_views_were_drawn() -> None:
    """The digest was taken before there were any other views: old stores must still open."""
    views = draw_views(table({"a": (40, 50), "b": (0, 0)}), SIZE, ViewsConfig())
    assert views.digest() == "b70613e92ba6617f23cb7b26fb3a5027ea21dabe01bfb7be6cdef1c1ec8bae56"


def test_quarantined_images_have_empty_boxes() -> None:
    views = draw_views(table({"a": (0, 0), "b": (40, 50)}), SIZE, ViewsConfig(count=2))
    assert not views.boxes[:2].any()
    assert not views.seeds[:2].any()
    assert views.boxes[2:, 2:].all()


def test_a_row_is_read_back_as_it_was_drawn() -> None:
    views = ViewTable(
        image_size=SIZE,
        boxes=np.array([[0, 0, 30, 40], [3, 5, 20, 21]], np.float32),
        flips=np.array([False, True]),
        seeds=np.zeros(2, np.uint64),
        views_per_image=2,
        photometric=np.array([[1, 1, 1, 0], [0.5, 1, 1.25, -0.25]], np.float32),
    )
    assert row_view(views, 0) == View(box=Box(top=0, left=0, height=30, width=40))
    assert row_view(views, 1) == View(
        box=Box(top=3, left=5, height=20, width=21),
        flip=True,
        photometric=Photometric(brightness=0.5, saturation=1.25, hue=-0.25),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "greater than or equal to 1"),
        ({"area": (0.5, 0.25)}, r"area is \[smallest, largest\]"),
        ({"area": (0.0, 1.0)}, "greater than 0"),
        ({"aspect": 0.5}, "greater than or equal to 1"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"photometric": {}}, "changes nothing"),
        ({"photometric": {"hue": 0.6}}, "less than or equal to 0.5"),
        ({"depth": "divided"}, "'metric' or 'scaled'"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewsConfig.model_validate(wrong)
