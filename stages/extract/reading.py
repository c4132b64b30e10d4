"""Decoding ahead: a few threads keep a bounded number of images ready, in order."""

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import BoundedSemaphore, Lock
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stages.data.images import OK, ImageError, ImageOutOfReachError, decode_data, read_data
from stages.data.places import Place, is_remote
from stages.data.sources import ImageSource
from stages.data.view import cut_view, whole
from stages.data.views import row_view
from stages.extract.clock import StageClock, threads
from stages.extract.errors import ExtractionError, ImageChangedError
from stages.extract.teachers import Teacher
from store.images import ImageTable, ViewTable
from store.reader import FeatureStore
from store.remote import StorePath

_SHOWN = 5
_REMOTE_THREADS = 16
"""Images on the way at once from a server, which answers some hundredths of a second later."""

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


@runtime_checkable
class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made", bound=_HasBytes)


class Recent(Generic[Key, Made]):
    """What was made last, up to `limit` bytes and at least one, so that nothing is made twice.

    Safe to share between threads: who comes second waits for who makes it.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self._limit = limit
        self._bytes = 0
        self._made: OrderedDict[Key, Future[Made]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key, make: Callable[[Key], Made]) -> Made:
        """Return what belongs to a key, made by `make` unless it is here."""
        with self._lock:
            found = self._made.get(key)
            future = self._made.setdefault(key, Future())
            self._made.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            made = make(key)
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(made)
        self._make_room(made.nbytes)
        return made

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._bytes += added
            done = [key for key, future in self._made.items() if future.done()]
            for key in done[:-1]:
                if self._bytes <= self._limit:
                    return
                future = self._made.pop(key)
                self._bytes -= 0 if future.exception() else future.result().nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A row as the teachers of a pass want it, by `RowReader.input_kind`."""

    by_kind: Mapping[Hashable, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(one.nbytes for one in self.by_kind.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the rows of a pass have in common, where that is wanted more than once."""

    images: Recent[int, NDArray[np.uint8]] | None = None
    """Decoded, by their place in the table: several views are of the same one."""
    inputs: Recent[int, Inputs] | None = None
    """By row: while an image is decoded it becomes the inputs of all teachers, which are small."""
    teachers: Mapping[Hashable, Teacher] = field(default_factory=dict)
    """One for each kind of inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads a row of the store's view table as its teacher's input."""

    teacher: Teacher
    images: ImageTable
    views: ViewTable
    paths: Mapping[str, Place]
    clock: StageClock = field(default_factory=StageClock)
    shared: Shared = field(default_factory=Shared)
    readers: int = field(default_factory=threads)
    """Threads to read with."""
    decoding: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(threads()))
    """Lets no more images be decoded at once than there are cores, however many are on the way."""

    @property
    def input_kind(self) -> Hashable:
        """Equal for readers of the same rows whose inputs are the same."""
        kind: Hashable = getattr(self.teacher, "input_kind", self.teacher.spec.name)
        return kind

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
            ExtractionError: it cannot be fetched now.
        """
        if self.shared.inputs is None:
            return self._input(row)
        return self.shared.inputs.get(row, self._inputs).by_kind[self.input_kind]

    def _input(self, row: int) -> Tensor:
        pixels = self.pixels(row)
        with self.decoding, self.clock.stage("preprocess"):
            return self.teacher.preprocess(pixels, whole(pixels))

    def _inputs(self, row: int) -> Inputs:
        pixels = self.pixels(row)
        with self.decoding, self.clock.stage("preprocess"):
            return Inputs(
                by_kind={
                    kind: teacher.preprocess(pixels, whole(pixels))
                    for kind, teacher in self.shared.teachers.items()
                }
            )

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return the pixels (h, w, 3) of a row's view, before any resizing.

        Raises:
            ImageChangedError: the file is gone or is not the one that was indexed.
            ExtractionError: it cannot be fetched now.
        """
        number = row // self.views.views_per_image
        kept = self.shared.images
        image = self._image(number) if kept is None else kept.get(number, self._image)
        with self.decoding, self.clock.stage("preprocess"):
            return cut_view(image, row_view(self.views, row))

    def _image(self, number: int) -> NDArray[np.uint8]:
        """Read and decode an image by its place in the table."""
        name, expected = self.images.ids[number], self.images.sha256[number]
        path = self.paths[name]
        try:
            with self.clock.stage("read"):
                data = read_data(path)
            with self.decoding, self.clock.stage("decode"):
                image = decode_data(path, data)
        except ImageOutOfReachError as error:
            raise ExtractionError(
                f"image {name!r} could not be fetched, tried again and again: {error}. Every "
                "finished shard is safe; run the same command again when its source answers"
            ) from error
        except ImageError as error:
            raise self._changed(name, str(error)) from error
        if image.sha256 != expected:
            found = f"sha256 {image.sha256[:12]} instead of {expected[:12]}"
            raise self._changed(name, f"{path} has {found}")
        return image.pixels

    def _changed(self, name: str, found: str) -> ImageChangedError:
        return ImageChangedError(
            f"image {name!r} changed since it was indexed: {found}. Put the old file back, or "
            "index the images anew into another store."
        )


def open_rows(
    path: str | StorePath,
    images: Sequence[ImageSource],
    image_size: tuple[int, int],
    teacher: Teacher,
) -> RowReader:
    """Return the reader of a store's rows as a teacher's inputs.

    Raises:
        ExtractionError: the store lists other images or views than the data set has.
    """
    store = FeatureStore(path)
    if store.views.image_size != image_size:
        raise ExtractionError(
            f"{path} holds views of {store.views.image_size} (height, width), asked for "
            f"{image_size}; choose another store path, or that image size"
        )
    paths = {image.id: image.path for image in images}
    if paths.keys() != set(store.images.ids):
        lacking = [name for name in store.images.ids if name not in paths]
        raise ExtractionError(
            f"{path} lists {len(store.images.ids)} images, the data set {len(paths)}; in the store "
            f"only: {', '.join(lacking[:_SHOWN]) or 'none'}. "
            + ("Index the data set into another store." if lacking else "Run `sak index --append`.")
        )
    return RowReader(
        teacher=teacher,
        images=store.images,
        views=store.views,
        paths=paths,
        readers=reading_threads(paths.values()),
    )


def reading_threads(places: Iterable[Place]) -> int:
    """Return how many threads read images: as many as cores, more where a network answers late."""
    return max(threads(), _REMOTE_THREADS) if any(map(is_remote, places)) else threads()
