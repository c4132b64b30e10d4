"""Choosing within a budget: never more than it, never worse for more of it, nothing dominated."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StepError
from pipeline.plan_budget import Option, choose, parse_size, smallest

OPTION = st.builds(
    lambda size, loss: Option(codec="int8", limit=None, bytes=size, loss=loss / 10**6),
    st.integers(1, 1000),
    st.integers(0, 10**6),
)
TEACHERS = st.dictionaries(
    st.sampled_from("abcd"), st.lists(OPTION, min_size=1, max_size=8), min_size=1
)


@given(TEACHERS, st.integers(0, 5000))
def test_never_exceeds_the_budget_and_refuses_only_what_cannot_be(
    options: dict[str, list[Option]], budget: int
) -> None:
    chosen = choose(options, budget)
    assert (chosen is None) == (smallest(options) > budget)
    if chosen is not None:
        assert chosen.keys() == options.keys()
        assert sum(one.bytes for one in chosen.values()) <= budget
        assert all(one in options[name] for name, one in chosen.items())


@given(TEACHERS, st.integers(0, 5000), st.integers(0, 5000))
def test_more_budget_never_loses_more(
    options: dict[str, list[Option]], one: int, other: int
) -> None:
    tight, wide = choose(options, min(one, other)), choose(options, max(one, other))
    if tight is not None:
        assert wide is not None
        assert all(wide[name].loss <= tight[name].loss for name in options)


@given(TEACHERS, st.integers(0, 5000))
def test_nothing_dominated_is_chosen(options: dict[str, list[Option]], budget: int) -> None:
    for name, chosen in (choose(options, budget) or {}).items():
        for other in options[name]:
            at_least = other.bytes <= chosen.bytes and other.loss <= chosen.loss
            assert not at_least or (other.bytes, other.loss) == (chosen.bytes, chosen.loss)


def test_what_loses_least_goes_first() -> None:
    cheap = [Option(codec="a", limit=None, bytes=100, loss=0.0),
             Option(codec="b", limit=None, bytes=50, loss=0.001)]  # fmt: skip
    dear = [Option(codec="a", limit=None, bytes=100, loss=0.0),
            Option(codec="b", limit=None, bytes=50, loss=0.1)]  # fmt: skip
    chosen = choose({"cheap": cheap, "dear": dear}, 150)
    assert chosen is not None
    assert {name: one.codec for name, one in chosen.items()} == {"cheap": "b", "dear": "a"}


@pytest.mark.parametrize(
    ("text", "size"), [("500GB", 500 * 10**9), ("1.5TB", 15 * 10**11), ("2GiB", 2**31), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["500 parsecs", "10**9", "-3GB", "nan", "", "GB", "0x10"])
def test_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(StepError, match=rf"'{re.escape(text)}' is no size.*500GB"):
        parse_size(text)
