"""Data sets: images by id, their splits, and labels in the geometry of a view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from stages.data.config import (
    DataConfig,
    FolderData,
    ManifestData,
    NyudData,
    ScenesData,
    WebDatasetData,
)
from stages.data.images import ImageError, read_size
from stages.data.labels import LabelError, label_mistakes, read_labels
from stages.data.places import Place
from stages.data.sources import (
    IMAGE_SUFFIXES,
    ImageSource,
    Layout,
    SourceError,
    list_folder,
    list_layout,
    list_manifest,
)
from stages.data.tars import list_tars
from stages.data.tasks import NYUD_TASKS, Task
from stages.data.view import DepthRule, View, replay_label, whole_image_box

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """An ordered image set with stable ids, its splits, and the tasks it has labels for."""

    images: tuple[ImageSource, ...]
    splits: Mapping[str, tuple[str, ...]]
    """Image ids per split; an unlabelled set is all `train`."""
    tasks: tuple[Task, ...] = ()
    label_root: Path | None = None
    """Folder of the label layout; None for unlabelled images."""
    _paths: Mapping[str, Place] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_paths", {image.id: image.path for image in self.images})

    def path(self, image_id: str) -> Place:
        """Return where an image's bytes are.

        Raises:
            SourceError: no image has this id.
        """
        try:
            return self._paths[image_id]
        except KeyError as error:
            raise SourceError(
                f"no image has the id '{image_id}'; the data set lists {len(self.images)} images"
            ) from error

    def split(self, name: str) -> tuple[str, ...]:
        """Return the image ids of a split, in order.

        Raises:
            SourceError: the data set has no such split.
        """
        if name not in self.splits:
            raise SourceError(f"no split '{name}'; the data set has {', '.join(self.splits)}")
        return self.splits[name]

    def with_tasks(self, names: Sequence[str]) -> "Dataset":
        """Return the same images with only the named tasks, in the given order.

        Raises:
            LabelError: the data set has no labels for one of the tasks.
        """
        known = {task.name: task for task in self.tasks}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise LabelError(
                f"the data set has no labels for {', '.join(unknown)};"
                f" it has: {', '.join(known) or 'none'}"
            )
        return replace(self, tasks=tuple(known[name] for name in names))

    def labels(
        self,
        image_id: str,
        image_size: tuple[int, int],
        view: View | None = None,
        depth: DepthRule = "metric",
    ) -> dict[str, npt.NDArray[Any]]:
        """Read an image's labels and bring them to a view (None: view 0) of `image_size` = (h, w).

        Per task an array h x w, for normals h x w x 3; values as in `read_labels`, `depth` as in
        `replay_label`. Empty for unlabelled images.

        Raises:
            LabelError: a label is missing, unreadable, of another size, or has wrong values.
            ImageError: the header of the image cannot be read.
            SourceError: no image has this id.
        """
        path = self.path(image_id)
        if self.label_root is None:
            return {}
        height, width = read_size(path)
        labels = read_labels(self.label_root, self.tasks, image_id, (height, width))
        view = view or View(box=whole_image_box(height, width, image_size))
        return {
            task: replay_label(task, label, view, image_size, depth)
            for task, label in labels.items()
        }

    def check_labels(self, split: str) -> None:
        """Check from headers alone that each label of a split is there and of its image's size.

        Raises:
            LabelError: naming the first ten mistakes and the number of all.
        """
        ids = self.split(split)
        if self.label_root is None:
            return
        root = self.label_root
        mistakes = [
            mistake
            for image_id in ids
            for mistake in label_mistakes(root, self.tasks, image_id, self._size(image_id))
        ]
        if mistakes:
            shown = "".join(f"\n  {mistake}" for mistake in mistakes[:_SHOWN])
            more = f"\n  and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
            raise LabelError(
                f"split '{split}' of {root} has {len(mistakes)} wrong labels:{shown}{more}"
            )

    def _size(self, image_id: str) -> tuple[int, int] | None:
        """Height and width; None for a bad image, which indexing has quarantined or will."""
        try:
            return read_size(self.path(image_id))
        except ImageError:
            return None


def open_dataset(config: DataConfig) -> Dataset:
    """List the images, splits and tasks that the configuration names; no pixel is read.

    Raises:
        SourceError: the images cannot be listed, or the scenes on disk are others in number.
    """
    match config:
        case FolderData():
            return _unlabelled(list_folder(config.root))
        case ManifestData():
            return _unlabelled(list_manifest(config.path, config.root))
        case WebDatasetData():
            suffixes = frozenset(config.suffixes) or IMAGE_SUFFIXES
            return _unlabelled(list_tars(config.shards, config.index, suffixes))
        case NyudData():
            return _labelled(config.root, list_layout(config.root), NYUD_TASKS)
        case ScenesData():
            return _open_scenes(config)


def _unlabelled(images: tuple[ImageSource, ...]) -> Dataset:
    return Dataset(images=images, splits={"train": tuple(image.id for image in images)})


def _labelled(root: Path, layout: Layout, tasks: tuple[Task, ...]) -> Dataset:
    return Dataset(images=layout.sources, splits=layout.splits, tasks=tasks, label_root=root)


def _open_scenes(config: ScenesData) -> Dataset:
    if not config.root.exists():
        raise SourceError(f"{config.root} does not exist; the scenes have to be rendered first")
    layout = list_layout(config.root)
    found = {split: len(ids) for split, ids in layout.splits.items()}
    if found != {"train": config.train, "val": config.val}:
        raise SourceError(
            f"{config.root} holds {found['train']} + {found['val']} scenes (train + val), the"
            f" configuration asks for {config.train} + {config.val}; render them anew into"
            " another folder"
        )
    from stages.data.tasks import SCENES_TASKS  # brings the renderer along

    return _labelled(config.root, layout, SCENES_TASKS)
