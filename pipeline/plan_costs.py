"""Time and money of an extraction, and when it pays: pure arithmetic on measured seconds."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds per image of what extraction does with it.

    `overlap`: on a GPU, reading threads decode while the loop runs; on the CPU they share its
    cores with the teacher, so that times add up. The loop itself does forward, encode and write
    one after the other (see `stages.extract.run`). `write` is None where it was not measured.
    """

    decode: float
    forward: float
    encode: float
    write: float | None
    overlap: bool

    @property
    def seconds(self) -> float:
        """Seconds per image in all."""
        return max(self.decode, self._loop) if self.overlap else self.decode + self._loop

    @property
    def _loop(self) -> float:
        return self.forward + self.encode + (self.write or 0.0)

    @property
    def bottleneck(self) -> str:
        """What to make faster first: decode, forward, encode or write."""
        steps = {"forward": self.forward, "encode": self.encode, "write": self.write or 0.0}
        if not self.overlap:
            steps["decode"] = self.decode
        elif self.decode >= self._loop:
            return "decode"
        return max(steps, key=lambda name: steps[name])


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
