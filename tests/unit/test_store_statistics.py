"""Statistics agree with numpy over everything at once, in whatever order parts are merged."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.statistics import Moments


def moments(values: NDArray[np.float16], covariance: bool = False) -> Moments:
    channels = values.shape[-1]
    product = np.empty((channels, channels)) if covariance else None
    return Moments.of(values.astype(np.float32), product)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    offset=st.sampled_from([0.0, 100.0, -30000.0]),
    data=st.data(),
)
def test_merge_in_any_order_equals_two_passes(
    seed: int, rows: int, offset: float, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(offset, 2, (rows, 3, 2, 4)).astype(np.float16)
    order = data.draw(st.permutations(range(rows)))
    split = data.draw(st.integers(0, rows))
    empty = Moments.empty(4)
    left = reduce(Moments.merge, (moments(values[i]) for i in order[:split]), empty)
    right = reduce(Moments.merge, (moments(values[i]) for i in order[split:]), empty)
    total = left.merge(right).statistics()
    tokens = values.astype(np.float64).reshape(-1, 4)
    assert total.count == len(tokens)
    deviation = tokens.std(axis=0)
    assert (np.abs(total.mean - tokens.mean(axis=0)) <= 1e-6 * deviation).all()
    np.testing.assert_allclose(total.variance, tokens.var(axis=0), rtol=1e-6)


def test_record_is_exact() -> None:
    one = moments(np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    back = Moments.from_record(one.to_record())
    assert back.count == 6
    np.testing.assert_array_equal(back.mean, one.mean)
    np.testing.assert_array_equal(back.m2, one.m2)


def test_nothing_merged_with_nothing_is_nothing() -> None:
    assert Moments.empty(3).merge(Moments.empty(3)).count == 0


def test_variance_is_of_the_population() -> None:
    values = np.array([0, 2], np.float16).reshape(1, 2, 1)
    assert moments(values).statistics().variance == pytest.approx([1.0])


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    channels=st.sampled_from([1, 4, 9]),
    offset=st.sampled_from([0.0, 100.0, -30000.0]),
    data=st.data(),
)
def test_any_tree_of_merges_gives_the_covariance_of_all_tokens(
    seed: int, rows: int, channels: int, offset: float, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(0, 1, (channels, channels))
    values = (generator.normal(0, 2, (rows, 3, 2, channels)) @ mixing + offset).astype(np.float16)
    parts = [moments(row, covariance=True) for row in values] + [Moments.empty(channels, True)]
    while len(parts) > 1:
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(through_the_record(first.merge(second)))
    total = parts[0].statistics()
    tokens = values.astype(np.float64).reshape(-1, channels)
    expected = np.cov(tokens, rowvar=False, bias=True).reshape(channels, channels)
    assert total.covariance is not None
    deviation = np.sqrt(np.diag(expected))
    error = np.abs(total.covariance - expected)
    assert (error <= 2e-6 * np.outer(deviation, deviation)).all()
    np.testing.assert_array_equal(np.diag(total.covariance), total.variance)
    np.testing.assert_array_equal(total.covariance, total.covariance.T)


def through_the_record(one: Moments) -> Moments:
    return Moments.from_record(one.to_record(), one.to_triangle())


def test_triangle_is_exact_and_half_as_large() -> None:
    one = moments(np.random.default_rng(0).normal(3, 2, (5, 4, 6)).astype(np.float16), True)
    assert one.to_triangle().shape == (6 * 7 // 2,)
    back = through_the_record(one)
    np.testing.assert_array_equal(back.comoment, one.comoment)


def test_covariance_changes_no_bit_of_the_variance() -> None:
    values = np.random.default_rng(0).normal(3, 2, (7, 5, 4, 6)).astype(np.float16)
    plain = reduce(Moments.merge, (moments(row) for row in values)).statistics()
    more = reduce(Moments.merge, (moments(row, True) for row in values)).statistics()
    assert plain.covariance is None
    np.testing.assert_array_equal(plain.mean, more.mean)
    np.testing.assert_array_equal(plain.variance, more.variance)
