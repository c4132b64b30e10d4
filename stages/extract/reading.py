"""Decoding ahead: a few threads keep a bounded number of images ready, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stages.data.images import OK, ImageError, ImageOutOfReachError, read_image
from stages.data.places import Place
from stages.data.view import cut_view, whole
from stages.data.views import row_view
from stages.extract.errors import ExtractionError, ImageChangedError
from stages.extract.teachers import Teacher
from store.images import ImageTable, ViewTable

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    load: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yield `load(item)` for each item in order, with at most `ahead` results in the making.

    An error of `load` is raised when its turn comes; what was begun by then is dropped.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                pending.append(pool.submit(load, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads a row of the store's view table as its teacher's input."""

    teacher: Teacher
    images: ImageTable
    views: ViewTable
    paths: Mapping[str, Place]

    def image_id(self, row: int) -> str:
        """Return the id of the image that a row is a view of."""
        return self.images.ids[row // self.views.views_per_image]

    def is_ok(self, row: int) -> bool:
        """Tell whether a row's image could be read when it was indexed."""
        return self.images.statuses[row // self.views.views_per_image] == OK

    def load(self, row: int) -> Tensor:
        """Return the input of a row, as its teacher prepares it.

        Raises:
            ImageChangedError: the file is gone or is not the one that was indexed.
        """
        pixels = self.pixels(row)
        return self.teacher.preprocess(pixels, whole(pixels))

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return the pixels (h, w, 3) of a row's view, before any resizing.

        Raises:
            ImageChangedError: the file is gone or is not the one that was indexed.
            ExtractionError: it cannot be fetched now.
        """
        name = self.image_id(row)
        expected = self.images.sha256[row // self.views.views_per_image]
        try:
            image = read_image(self.paths[name])
        except ImageOutOfReachError as error:
            raise ExtractionError(
                f"image {name!r} could not be fetched, tried again and again: {error}. Every "
                "finished shard is safe; run the same command again when its source answers"
            ) from error
        except ImageError as error:
            raise self._changed(name, str(error)) from error
        if image.sha256 != expected:
            found = f"sha256 {image.sha256[:12]} instead of {expected[:12]}"
            raise self._changed(name, f"{self.paths[name]} has {found}")
        return cut_view(image.pixels, row_view(self.views, row))

    def _changed(self, name: str, found: str) -> ImageChangedError:
        return ImageChangedError(
            f"image {name!r} changed since it was indexed: {found}. Put the old file back, or "
            "index the images anew into another store."
        )
