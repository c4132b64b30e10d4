"""Which images `sak plan` looks at, without a store and without reading all of them."""

import heapq
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.params import Params
from stages.data.config import ScenesData
from stages.data.dataset import Dataset, open_dataset
from stages.data.sources import ImageSource
from stages.extract.calibrate import sampling_order
from stages.progress import NoProgress
from store.images import ImageTable


def sample_images(images: tuple[ImageSource, ...], count: int) -> tuple[ImageSource, ...]:
    """Return the images that extraction would take first to fit a codec, spread over the set."""
    numbered = heapq.nsmallest(
        count, enumerate(images), key=lambda pair: sampling_order(pair[1].id, pair[0])
    )
    return tuple(image for _, image in numbered)


def listed_table(dataset: Dataset) -> ImageTable:
    """Return a table of the right ids; of the files' content nothing is known yet."""
    count = len(dataset.images)
    return ImageTable(
        ids=tuple(image.id for image in dataset.images),
        sha256=("",) * count,
        heights=(0,) * count,
        widths=(0,) * count,
        statuses=("ok",) * count,
    )


@contextmanager
def planned_dataset(params: Params, some: int) -> Iterator[tuple[Dataset, int]]:
    """Give the data set and how many images it has; of scenes yet to be rendered, some."""
    data = params.data
    if not isinstance(data, ScenesData) or data.root.exists():
        dataset = open_dataset(data)
        yield dataset, len(dataset.images)
        return
    from stages.data.scenes import write_scenes

    with tempfile.TemporaryDirectory(prefix="sak-plan-") as folder:
        few = data.model_copy(
            update={"root": Path(folder) / "scenes", "train": min(some, data.train), "val": 1}
        )
        write_scenes(few.root, few.train, few.val, few.seed, params.image_size, NoProgress())
        yield open_dataset(few), data.train + data.val
