"""Scenes for pre-training: rendered once, kept as one file, served in seeded batches."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, Int32, UInt8
from torch import Tensor

from stages.data.scenes import render_scene, scene_seed
from stages.data.scenes.camera import Camera, choose_camera
from stages.data.scenes.caption import describe
from stages.data.scenes.layout import furnish
from stages.data.scenes.room import Room
from stages.data.scenes.trace import Tracer
from stages.progress import Progress

CLOSE_UPS = 6
_RENDER_CHUNK = 16  # scenes sent to a process at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the objectives may look at. No class label, depth or normal is among it."""

    images: Float[Tensor, "B 3 H W"]  # normalised with the model's mean and deviation
    instances: Int[Tensor, "B H W"]  # 0 the room, one positive id per object
    corners: Int[Tensor, "B 2"]  # top and left pixel of a close-up of each image
    captions: tuple[str, ...]  # of the close-ups


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneCache:
    """All scenes of the pre-training stream in memory."""

    images: UInt8[np.ndarray, "N H W 3"]
    instances: UInt8[np.ndarray, "N H W"]
    corners: Int16[np.ndarray, "N K 2"]
    captions: tuple[tuple[str, ...], ...]  # N tuples of K

    def __len__(self) -> int:
        """Count the scenes."""
        return len(self.captions)

    def batch(
        self, rows: Int[np.ndarray, " B"], turn: int, mean: Tensor, deviation: Tensor
    ) -> Batch:
        """Collect scenes, with the close-ups whose turn it is (they take turns).

        `mean` and `deviation` are those of the RGB channels in [0, 1].
        """
        turn %= CLOSE_UPS
        pixels = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float() / 255
        return Batch(
            images=(pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1),
            instances=torch.from_numpy(self.instances[rows]).long(),
            corners=torch.from_numpy(self.corners[rows, turn]).long(),
            captions=tuple(self.captions[row][turn] for row in rows),
        )


def load_scenes(
    path: Path, count: int, image_size: tuple[int, int], seed: int, progress: Progress
) -> SceneCache:
    """Read the cache at `path`, or render `count` scenes on all cores and write it.

    Raises:
        ValueError: The file holds other scenes than those asked for.
    """
    recipe = json.dumps({"count": count, "image_size": list(image_size), "seed": seed})
    if not path.exists():
        _save(path, render_scenes(count, image_size, seed, progress), recipe)
    with np.load(path) as stored:
        if (found := str(stored["recipe"])) != recipe:
            raise ValueError(
                f"{path} holds scenes of {found}, but {recipe} is asked for; "
                "delete the file or name another one"
            )
        return SceneCache(
            images=stored["images"],
            instances=stored["instances"],
            corners=stored["corners"],
            captions=tuple(map(tuple, json.loads(str(stored["captions"])))),
        )


def render_scenes(
    count: int, image_size: tuple[int, int], seed: int, progress: Progress, workers: int = 0
) -> SceneCache:
    """Render scenes 0 .. count-1 of the "pretrain" stream; `workers` 0 means every core."""
    progress.start("render scenes", count)
    images = np.empty((count, *image_size, 3), np.uint8)
    instances = np.empty((count, *image_size), np.uint8)
    corners = np.empty((count, CLOSE_UPS, 2), np.int16)
    captions = []
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside torch's threads
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        job = partial(_render, seed=seed, image_size=image_size)
        for index, parts in enumerate(pool.map(job, range(count), chunksize=_RENDER_CHUNK)):
            images[index], instances[index], corners[index], told = parts
            captions.append(told)
            progress.advance()
    return SceneCache(images=images, instances=instances, corners=corners, captions=tuple(captions))


def row_batches(count: int, batch_size: int, seed: int) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield row numbers for ever: each epoch is a seeded permutation, its rest is dropped."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count)
        for first in range(0, count - batch_size + 1, batch_size):
            yield order[first : first + batch_size]


def close_up_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Half the image's sides: at a quarter of the price, things are as large as in the image."""
    return image_size[0] // 2, image_size[1] // 2


def close_ups(
    number: int, instances: Int32[np.ndarray, "H W"]
) -> tuple[Int16[np.ndarray, "K 2"], tuple[str, ...]]:
    """Choose windows around random things of scene `number`, and tell what is in them.

    The words are those of the scene graph, about the window alone: a caption of the whole room
    names a few of its things, says nothing about where, and teaches little in a short time.
    """
    rng = np.random.default_rng(number)
    room, camera = _stage(number)
    height, width = close_up_size((instances.shape[0], instances.shape[1]))
    last = np.subtract(instances.shape, (height, width))
    choices = np.unique(instances[instances > 0]) if instances.any() else np.zeros(1, np.int32)
    corners, captions = [], []
    for _ in range(CLOSE_UPS):
        centre = rng.choice(np.argwhere(instances == rng.choice(choices)))
        shift = rng.integers((height // 4, width // 4), (3 * height // 4, 3 * width // 4))
        top, left = np.clip(centre - shift, 0, last)
        corners.append((top, left))
        captions.append(describe(room, camera, instances[top : top + height, left : left + width]))
    return np.array(corners, np.int16), tuple(captions)


def _stage(number: int) -> tuple[Room, Camera]:
    """Set up the scene as `render_scene` does, without the picture."""
    layout_rng, camera_rng, _ = (
        np.random.Generator(np.random.Philox(seed))
        for seed in np.random.SeedSequence(number).spawn(3)
    )
    room = furnish(layout_rng)
    return room, choose_camera(camera_rng, room, Tracer(room.things).nearest)


def _render(
    index: int, seed: int, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    number = scene_seed("pretrain", seed, index)
    scene = render_scene(number, image_size)
    assert scene.instances.max() < 256
    corners, captions = close_ups(number, scene.instances)
    return scene.image, scene.instances.astype(np.uint8), corners, captions


def _save(path: Path, scenes: SceneCache, recipe: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    with temporary.open("wb") as file:
        np.savez(
            file,
            images=scenes.images,
            instances=scenes.instances,
            corners=scenes.corners,
            captions=json.dumps(scenes.captions),
            recipe=recipe,
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
