"""`sak index`: render the scenes if asked for, check images and labels, create or grow the store."""

import math
from dataclasses import dataclass

from pipeline.errors import StepError
from pipeline.params import Params
from stages.data.config import ScenesData
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import OK, index_images, try_images
from stages.data.views import draw_views
from stages.progress import Progress
from store.admit import admit_images, admitted, stored_images, with_stored_reasons
from store.append import append_images, in_stored_order
from store.create import create_store
from store.images import ImageTable
from store.reader import FeatureStore

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
    admitted: tuple[str, ...] = ()
    """Images taken out of quarantine by `retry_quarantined`."""


def index(
    params: Params, append: bool, progress: Progress, max_bad: str | None = None
) -> IndexSummary:
    """Render the scenes if the recipe wants them, check images and labels, create the store.

    Its views are drawn here, once and for all. With `append` a store that is there grows by the
    images that it does not list yet. `max_bad` replaces the parameter of that name, see
    `bad_share`.
    """
    if isinstance(params.data, ScenesData):
        _render(params.data, params.image_size, progress)
    dataset = _checked_dataset(params)
    share = params.data.max_bad if max_bad is None else bad_share(max_bad, len(dataset.images))
    images = index_images(dataset.images, share, progress)
    stored = stored_images(params.store)
    if stored is not None:
        images = with_stored_reasons(images, stored)
    if append:
        images = in_stored_order(params.store, images)
    place = create_store if stored is None or not append else append_images
    place(params.store, images, draw_views(images, params.image_size, params.views))
    return _summary(params, dataset, images)


def retry_quarantined(params: Params, progress: Progress) -> IndexSummary:
    """Read quarantined images again and let in those that can be used now.

    Nothing else is read. Teachers compute the shards that hold such images when they are
    extracted again.

    Raises:
        StepError: there is no store yet.
    """
    stored = stored_images(params.store)
    if stored is None:
        raise StepError(f"there is no store at {params.store} yet; run `sak index` first")
    dataset = _checked_dataset(params)
    quarantined = _quarantined(stored)
    sources = [image for image in dataset.images if image.id in quarantined]
    if not sources:
        return _summary(params, dataset, stored)
    images = admitted(stored, try_images(sources, progress))
    admit_images(params.store, images, draw_views(images, params.image_size, params.views))
    names = quarantined.keys() - _quarantined(images).keys()
    return _summary(params, dataset, images, tuple(sorted(names)))


def bad_share(text: str, images: int) -> float:
    """Return the share of so many images that a count (`30`), `0.1%` or a share (`0.001`) means.

    Raises:
        StepError: it is none of these.
    """
    try:
        if text.endswith("%"):
            share = float(text.removesuffix("%")) / 100
        elif text.isdigit():
            return min(1.0, int(text) / images)
        else:
            share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise StepError(f"--max-bad {text}: a number of images such as 30, or a share such as 0.1%")
    return share


def _checked_dataset(params: Params) -> Dataset:
    dataset = open_dataset(params.data).with_tasks(params.tasks)
    for split in dataset.splits:
        dataset.check_labels(split)
    return dataset


def _quarantined(images: ImageTable) -> dict[str, str]:
    return {
        name: status
        for name, status in zip(images.ids, images.statuses, strict=True)
        if status != OK
    }


def _summary(
    params: Params, dataset: Dataset, images: ImageTable, let_in: tuple[str, ...] = ()
) -> IndexSummary:
    return IndexSummary(
        images=len(images),
        views_per_image=params.views.count,
        quarantined=_quarantined(images),
        splits={name: len(ids) for name, ids in dataset.splits.items()},
        tasks=tuple(task.name for task in dataset.tasks),
        store=params.store,
        images_digest=images.digest(),
        admitted=let_in,
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
