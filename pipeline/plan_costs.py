"""Time and money of an extraction, and when it pays: pure arithmetic on measured seconds."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds per image of what extraction does with it.

    On a GPU (`overlap`) reading, the teacher, and encoding with writing run side by side, and the
    slowest sets the pace (see `stages.extract.flow`); on the CPU all but the disk share its cores,
    so that times add up. `write` is None where it was not measured.
    """

    decode: float
    forward: float
    encode: float
    write: float | None
    overlap: bool

    @property
    def seconds(self) -> float:
        """Seconds per image in all."""
        write = self.write or 0.0
        if self.overlap:
            return max(self.decode, self.forward, self.encode + write)
        return max(self.decode + self.forward + self.encode, write)

    @property
    def bottleneck(self) -> str:
        """What to make faster first: decode, forward, encode or write."""
        steps = {
            "decode": self.decode,
            "forward": self.forward,
            "encode": self.encode,
            "write": self.write or 0.0,
        }
        return max(steps, key=lambda name: steps[name])


def one_pass(paces: Sequence[Pace], shared: Sequence[float]) -> float:
    """Return seconds per image of all teachers in one pass.

    `shared` is the part of each teacher's `decode` that is the same for all: to read and decode.
    """
    return Pace(
        decode=sum(pace.decode for pace in paces) - (sum(shared) - max(shared)),
        forward=sum(pace.forward for pace in paces),
        encode=sum(pace.encode for pace in paces),
        write=sum(pace.write or 0.0 for pace in paces),
        overlap=paces[0].overlap,
    ).seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Seconds of caching, `once` and `cached` per epoch, against `online` teachers per epoch."""

    once: float
    cached: float
    online: float
    epochs: float

    @property
    def break_even(self) -> int | None:
        """The first epoch at whose end caching has taken less time, None if there is none."""
        if self.online <= self.cached:
            return None
        return math.floor(self.once / (self.online - self.cached)) + 1

    @property
    def cached_total(self) -> float:
        """Seconds with the store over all epochs."""
        return self.once + self.epochs * self.cached

    @property
    def online_total(self) -> float:
        """Seconds with online teachers over all epochs."""
        return self.epochs * self.online

    def to_json(self) -> dict[str, float | None]:
        """Return all figures."""
        return {
            **asdict(self),
            "break_even_epoch": self.break_even,
            "cached_total": self.cached_total,
            "online_total": self.online_total,
        }


def duration(seconds: float) -> str:
    """Return seconds as people write them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 86400:,.3g} days"
