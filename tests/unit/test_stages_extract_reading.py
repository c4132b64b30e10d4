import threading

import pytest

from stages.extract.reading import read_ahead


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    begun: list[int] = []
    results = read_ahead(lambda item: begun.append(item) or item, range(20), threads=3, ahead=4)
    for expected in range(20):
        assert next(results) == expected
        assert len(begun) <= expected + 4
    assert next(results, None) is None


def test_reading_ahead_raises_in_turn_and_stops() -> None:
    def load(item: int) -> int:
        if item == 3:
            raise ValueError(str(item))
        return item

    results = read_ahead(load, range(1000), threads=2, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
