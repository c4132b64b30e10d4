"""The order of images and the choice of teachers: pure functions, exactly once, for any ranks."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train.sampling import (
    BatchSizeError,
    Draw,
    Shuffle,
    StepSampler,
    TeachersPerImageError,
    ask_teachers,
    check_teachers_per_image,
    choose_teachers,
    one_shard,
)

IMAGES = st.integers(1, 40)
SEEDS = st.integers(0, 2**63 - 1)


def shuffle(images: int = 10, seed: int = 7, rows: int = 4, window: int = 2) -> Shuffle:
    return Shuffle(shards=np.arange(images) // rows, window=window, seed=seed)


def draws(start: int, stop: int, order: Shuffle, batch_size: int = 3, **ranks: int) -> list[Draw]:
    sampler = StepSampler(order, batch_size=batch_size, start=start, stop=stop, **ranks)
    batches = list(sampler)
    assert len(batches) == len(sampler) == stop - start
    return list(chain.from_iterable(batches))


@given(IMAGES, st.integers(1, 9), st.integers(1, 5), SEEDS, st.integers(0, 5))
def test_an_order_holds_every_image_once_and_reads_a_window_at_a_time(
    images: int, rows: int, window: int, seed: int, epoch: int
) -> None:
    one = shuffle(images, seed, rows, window)
    order = one.order(epoch)
    assert sorted(order) == list(range(images))
    shards, done = one.shards[order], 0
    for _ in range(0, int(one.shards.max()) + 1, window):
        here = list(dict.fromkeys(shards[done:].tolist()))[:window]  # the next ones to be met
        count = int(np.isin(one.shards, here).sum())
        assert set(shards[done : done + count]) == set(here)
        done += count
    assert done == images
    np.testing.assert_array_equal(order, shuffle(images, seed, rows, window).order(epoch))


@given(IMAGES, SEEDS)
def test_a_window_of_all_shards_is_a_plain_permutation(images: int, seed: int) -> None:
    plain = Shuffle(shards=one_shard(images), window=1, seed=seed).order(3)
    np.testing.assert_array_equal(shuffle(images, seed, rows=2, window=99).order(3), plain)


def test_orders_within_a_window_are_uniform() -> None:
    one = Shuffle(shards=np.array([0, 0, 1, 2, 2, 2]), window=2, seed=0)
    orders = [one.order(epoch) for epoch in range(3000)]
    possible = 4 * 3 * 2 * 2 + 5 * 4 * 3 * 2 + 3 * 2 * 3 * 2  # by the shard that is left to the end
    assert len({tuple(order) for order in orders}) == possible
    first = Counter(int(order[0]) for order in orders)
    assert min(first.values()) > 300


@given(IMAGES, st.data(), SEEDS)
def test_every_image_is_seen_once_per_epoch_whatever_the_batch_size(
    images: int, data: st.DataObject, seed: int
) -> None:
    batch_size = data.draw(st.integers(1, images))
    epochs = batch_size  # then whole epochs fill whole batches
    seen = Counter(draws(0, images, shuffle(images, seed), batch_size))
    assert seen == Counter(Draw(epoch=e, index=i) for e in range(epochs) for i in range(images))


@given(st.integers(6, 40), st.integers(0, 30), SEEDS)
def test_a_step_sees_the_same_images_with_any_number_of_ranks(
    images: int, start: int, seed: int
) -> None:
    order, stop = shuffle(images, seed), start + 8
    alone = draws(start, stop, order, 6)
    for world in (2, 3, 6):
        ranks = [draws(start, stop, order, 6, rank=r, world=world) for r in range(world)]
        share = 6 // world
        for step in range(8):
            parts = [rank[step * share : (step + 1) * share] for rank in ranks]
            assert list(chain.from_iterable(parts)) == alone[step * 6 : (step + 1) * 6]


def test_small_batches_of_an_accumulated_step_are_its_parts() -> None:
    assert draws(2 * 5, 2 * 9, shuffle(), 3) == draws(5, 9, shuffle(), 6)


def test_the_order_follows_from_seed_and_step_alone() -> None:
    whole = draws(0, 8, shuffle())
    assert draws(4, 8, shuffle()) == whole[12:]
    assert draws(0, 8, shuffle(seed=8)) != whole


def test_a_batch_that_cannot_be_filled_or_shared_is_refused() -> None:
    with pytest.raises(BatchSizeError, match="set it to at most 10"):
        StepSampler(shuffle(), batch_size=11, start=0, stop=1)
    with pytest.raises(BatchSizeError, match="multiple of 2"):
        StepSampler(shuffle(), batch_size=3, start=0, stop=1, world=2)


@given(st.integers(1, 6), st.data(), SEEDS, st.integers(0, 9))
def test_an_image_asks_each_teacher_equally_often(
    teachers: int, data: st.DataObject, seed: int, cycle: int
) -> None:
    count = data.draw(st.integers(1, teachers))
    epochs = range(cycle * teachers, (cycle + 1) * teachers)
    chosen = [choose_teachers(seed, epoch, "room/1", teachers, count) for epoch in epochs]
    assert all(len(set(some)) == count for some in chosen)
    assert Counter(chain.from_iterable(chosen)) == dict.fromkeys(range(teachers), count)


def test_teachers_are_drawn_by_seed_epoch_and_image() -> None:
    def drawn(seed: int, cycle: int) -> list[list[int]]:
        return [choose_teachers(seed, 3 * cycle, f"{k}", 3, 1) for k in range(600)]

    assert min(Counter(map(tuple, drawn(0, 0))).values()) > 150
    assert drawn(0, 0) == drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)


def test_a_batch_knows_which_images_ask_a_teacher() -> None:
    some, names = [Draw(epoch=1, index=k) for k in range(3)], ("a", "b", "c")
    asked = ask_teachers(0, some, ("x", "y", "z"), names, 2)
    for place, name in enumerate(("x", "y", "z")):
        expected = {names[number] for number in choose_teachers(0, 1, name, 3, 2)}
        assert {key for key, places in asked.items() if places and place in places} == expected
    assert ask_teachers(0, some, ("x", "y", "z"), names, None) == dict.fromkeys(names)


@pytest.mark.parametrize("count", [0, 4])
def test_more_teachers_than_there_are_cannot_be_asked(count: int) -> None:
    with pytest.raises(TeachersPerImageError, match=r"a, b, c.*1 to 3"):
        check_teachers_per_image(count, ("a", "b", "c"))
    check_teachers_per_image(3, ("a", "b", "c"))
