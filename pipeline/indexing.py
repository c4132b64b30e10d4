"""`sak index`: render the scenes if asked for, check images and labels, create or grow the store."""

from dataclasses import dataclass

import numpy as np

from pipeline.params import Params
from stages.data.config import ScenesData
from stages.data.dataset import open_dataset
from stages.data.images import OK, index_images
from stages.data.view import whole_image_box
from stages.progress import Progress
from store.append import append_images, in_stored_order
from store.create import create_store
from store.images import ImageTable, ViewTable
from store.layout import METADATA
from store.remote import locate


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSummary:
    """What `sak index` found."""

    images: int
    quarantined: dict[str, str]
    """Reason per unusable image id."""
    splits: dict[str, int]
    tasks: tuple[str, ...]
    store: str
    images_digest: str


def index(params: Params, append: bool, progress: Progress) -> IndexSummary:
    """Render the scenes if the recipe wants them, check images and labels, create the store.

    With `append` a store that is there grows by the images that it does not list yet.
    """
    if isinstance(params.data, ScenesData):
        _render(params.data, params.image_size, progress)
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    for split in dataset.splits:
        dataset.check_labels(split)
    images = index_images(dataset.images, params.data.max_bad, progress)
    if append:
        images = in_stored_order(params.store, images)
    there = (locate(params.store) / METADATA).exists()
    place = append_images if append and there else create_store
    place(params.store, images, whole_image_views(images, params.image_size))
    return IndexSummary(
        images=len(images),
        quarantined={
            name: status
            for name, status in zip(images.ids, images.statuses, strict=True)
            if status != OK
        },
        splits={name: len(ids) for name, ids in dataset.splits.items()},
        tasks=tuple(task.name for task in dataset.tasks),
        store=params.store,
        images_digest=images.digest(),
    )


def whole_image_views(images: ImageTable, image_size: tuple[int, int]) -> ViewTable:
    """View 0 of every image; a quarantined image has no size and gets an empty box."""
    boxes = np.zeros((len(images), 4), np.float32)
    for row, (height, width) in enumerate(zip(images.heights, images.widths, strict=True)):
        if height and width:
            box = whole_image_box(height, width, image_size)
            boxes[row] = (box.top, box.left, box.height, box.width)
    rows = len(images)
    return ViewTable(
        image_size=image_size,
        boxes=boxes,
        flips=np.zeros(rows, np.bool_),
        seeds=np.zeros(rows, np.uint64),
    )


def _render(data: ScenesData, image_size: tuple[int, int], progress: Progress) -> None:
    from stages.data.scenes import write_scenes

    write_scenes(data.root, data.train, data.val, data.seed, image_size, progress)
