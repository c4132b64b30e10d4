"""Statistics agree with numpy over everything at once, in whatever order parts are merged."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.statistics import Moments


def moments(values: NDArray[np.float16]) -> Moments:
    return Moments.of(values, np.empty((values.shape[0] * values.shape[1], values.shape[2])))


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
    np.testing.assert_allclose(total.mean, tokens.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.variance, tokens.var(axis=0), rtol=1e-9, atol=1e-12)


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
