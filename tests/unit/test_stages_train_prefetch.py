"""Batches are made ahead of who asks, in order, and what goes wrong is told as it is."""

import pickle
import threading
import traceback
from collections.abc import Iterator

import pytest
from torch.utils.data import Dataset

from stages.train.prefetch import _raising, _Reporting, ahead, load
from store.errors import StoreMismatchError


class Numbers(Dataset[list[int]]):
    """Doubles what it is asked for; refuses 13."""

    def __getitems__(self, draws: list[int]) -> list[int]:
        if 13 in draws:
            raise StoreMismatchError("a shard is gone", teacher="dino")
        return [2 * number for number in draws]


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    before = set(threading.enumerate())
    made, used = [threading.Event() for _ in range(3)], []

    def source() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in ahead(source()):
        if number < 2:
            assert made[number + 1].wait(60)  # else this would never end
        if number == 0:
            assert not made[2].is_set()  # one ahead, not more
        used.append(number)
    assert used == [0, 1, 2]
    assert set(threading.enumerate()) <= before


def test_batches_come_in_order_and_a_mistake_in_its_place() -> None:
    batches = load(Numbers(), [[1, 2], [3], [13], [4]], pin=False)
    assert [next(batches), next(batches)] == [[2, 4], [6]]
    with pytest.raises(StoreMismatchError, match="a shard is gone"):
        next(batches)


def test_who_stops_early_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    batches = load(Numbers(), ([number] for number in range(1000)), pin=False)
    assert next(batches) == [0]
    batches.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_a_mistake_in_a_process_keeps_its_text_and_says_where() -> None:
    reporting = _Reporting(Numbers())
    sent = [pickle.loads(pickle.dumps(reporting.__getitems__(draws))) for draws in ([2], [13])]
    results = _raising(iter(sent))
    assert next(results) == [4]
    with pytest.raises(StoreMismatchError, match="a shard is gone") as caught:
        next(results)
    assert str(caught.value) == "a shard is gone"
    assert caught.value.teacher == "dino"
    assert "in __getitems__" in "".join(traceback.format_exception(caught.value))


def test_a_fault_of_ours_is_not_taken_for_a_mistake() -> None:
    class Faulty(Dataset[int]):
        def __getitems__(self, draws: list[int]) -> int:
            raise KeyError(draws[0])

    with pytest.raises(KeyError):
        _Reporting(Faulty()).__getitems__([1])
