"""`sak index`: render the scenes if asked for, check images and labels, create or grow the store."""

from dataclasses import dataclass

from pipeline.errors import StepError
from pipeline.params import Params
from stages.data.config import ScenesData
from stages.data.dataset import open_dataset
from stages.data.images import OK, index_images
from stages.data.views import draw_views
from stages.progress import Progress
from store.append import append_images, in_stored_order
from store.create import create_store
from store.layout import METADATA
from store.reader import FeatureStore
from store.remote import locate

_COMPARED = 1000  # images whose views are drawn again before a store is used


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSummary:
    """What `sak index` found."""

    images: int
    views_per_image: int
    quarantined: dict[str, str]
    """Reason per unusable image id."""
    splits: dict[str, int]
    tasks: tuple[str, ...]
    store: str
    images_digest: str


def index(params: Params, append: bool, progress: Progress) -> IndexSummary:
    """Render the scenes if the recipe wants them, check images and labels, create the store.

    Its views are drawn here, once and for all. With `append` a store that is there grows by the
    images that it does not list yet.
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
    place(params.store, images, draw_views(images, params.image_size, params.views))
    return IndexSummary(
        images=len(images),
        views_per_image=params.views.count,
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


def require_views(params: Params) -> None:
    """Refuse a store whose views are not those that the parameter file draws.

    They are drawn again for some of the images, which other settings would not leave as they are.

    Raises:
        StepError: they differ. Views of another size are left to whoever uses the store.
        StoreError: there is no store.
    """
    store = FeatureStore(params.store)
    if store.views.image_size != params.image_size:
        return
    places = range(0, len(store.images), -(-len(store.images) // _COMPARED))
    drawn = draw_views(store.images.take(places), params.image_size, params.views)
    if drawn != store.views.of_images(places):
        raise StepError(
            f"{params.store} holds {store.views.views_per_image} view(s) per image, which are not "
            f"the {params.views.count} that `views:` in the parameter file draws. Put the settings "
            "back that `sak index` was run with, or set store: to another path and index there"
        )


def _render(data: ScenesData, image_size: tuple[int, int], progress: Progress) -> None:
    from stages.data.scenes import write_scenes

    write_scenes(data.root, data.train, data.val, data.seed, image_size, progress)
