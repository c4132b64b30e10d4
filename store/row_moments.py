"""Moments of what a reader gets of rows, gathered one row at a time and without a batch's traces."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from store.codecs import Codec, Codes, FloatCodec
from store.statistics import Moments
from store.teacher_layout import TeacherLayout

DecodeInto = Callable[[Codes, NDArray[np.float32]], object]
"""Fills an array with what codes stand for, as the codecs' own `decode` does."""


class RowMoments:
    """Decodes single rows of one target and sums them; not to be shared between threads.

    The co-moments of the last row are overwritten by those of the next. `decode` is the codec's, or
    a faster one to the same bits.
    """

    def __init__(
        self, codec: Codec, channels: int, covariance: bool, decode: DecodeInto | None = None
    ) -> None:
        self._codec = codec
        self._decode = decode or codec.decode
        self.channels = channels
        # Fresh arrays per row would cost more in page faults than the sums themselves.
        self._decoded: NDArray[np.float32] | None = None
        self._product = np.empty((channels, channels)) if covariance else None

    def __call__(self, codes: Codes) -> Moments:
        """Return the moments of a row as stored."""
        if self._decoded is None:
            self._decoded = np.array(self._codec.decode(codes), np.float32)
        else:
            self._decode(codes, self._decoded)
        return Moments.of(self._decoded, self._product)


class PartMoments:
    """The moments of parts of a teacher, as `FeatureWriter.write_codes` wants them."""

    def __init__(
        self,
        layout: TeacherLayout,
        codecs: Mapping[str, Codec],
        decode_floats: DecodeInto | None = None,
    ) -> None:
        self._covariance = layout.covariance
        self._rows: dict[str, RowMoments] = {}
        for target in layout.spec.targets:
            codec = codecs[target.name]
            decode = decode_floats if isinstance(codec, FloatCodec) else None
            self._rows[target.name] = RowMoments(codec, target.channels, layout.covariance, decode)

    def __call__(self, target: str, codes: Codes, valid: NDArray[np.bool_]) -> Iterable[Moments]:
        """Return the moments of each valid one of rows (n, ...) of a target, `valid` (n,).

        With covariances, which are large, each is made when it is asked for, over the last.
        """
        moments = self._of_rows(target, codes, valid)
        return moments if self._covariance else list(moments)

    def _of_rows(self, target: str, codes: Codes, valid: NDArray[np.bool_]) -> Iterator[Moments]:
        for row, good in zip(codes, valid, strict=True):
            if good:
                yield self._rows[target](row)
