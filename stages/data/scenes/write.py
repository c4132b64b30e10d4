"""Scenes on disk, in the published NYUD-v2 multi-task layout plus `saliency/` and `parts/`."""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from stages.data.scenes.render import CLASSES, Scene, render_scene, scene_seed
from stages.progress import Progress

GENERATOR = 1
"""Raise whenever the same seed begins to give another scene: old folders are then refused."""
RECIPE = "recipe.json"
MOST_WORKERS = 8
FOLDERS = ("images", "segmentation", "edge", "normals", "depth", "saliency", "parts")


class ScenesError(ValueError):
    """The target folder holds something other than the scenes asked for."""


def write_scenes(
    root: Path, train: int, val: int, seed: int, image_size: tuple[int, int], progress: Progress
) -> None:
    """Render `train` + `val` scenes of a base seed into the folder `root`.

    The work is done by processes, in a temporary folder beside `root` that is renamed when all
    is written; an interrupted run leaves nothing behind. Does nothing when `root` already holds
    exactly these scenes. Scene i of a split is `render_scene(scene_seed(split, seed, i), ...)`.

    Args:
        root: folder to create; its parents are made.
        train: number of scenes listed in `gt_sets/train.txt`.
        val: number of scenes listed in `gt_sets/val.txt`.
        seed: base seed, 0 or more.
        image_size: height and width in pixels.
        progress: told about every scene.

    Raises:
        ScenesError: `root` holds scenes of another recipe, or files that are not scenes.
    """
    recipe = {
        "generator": GENERATOR, "seed": seed, "train": train, "val": val,
        "image_size": list(image_size), "classes": list(CLASSES),
    }  # fmt: skip
    if _holds(root, recipe):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_all(partial, {"train": train, "val": val}, seed, image_size, progress)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
        partial.chmod(0o755)  # mkdtemp makes it private
        os.sync()
        partial.replace(root)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _holds(root: Path, recipe: dict[str, object]) -> bool:
    """Whether `root` holds the scenes of a recipe; False when it is absent or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / RECIPE
    if not path.is_file():
        raise ScenesError(
            f"{root} exists and is not a folder of rendered scenes (it has no {RECIPE}). "
            "Choose another root for the scenes, or remove what is there."
        )
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ScenesError(f"{path} is damaged ({error}); remove {root} to render anew") from error
    keys = [k for k in recipe | found if found.get(k) != recipe.get(k)]
    if not keys:
        return True
    differences = "; ".join(f"{k}: has {found.get(k)}, asked {recipe.get(k)}" for k in keys)
    raise ScenesError(
        f"{root} holds scenes of another recipe ({differences}). "
        "Choose another root, or remove the folder to render it anew."
    )


def _write_all(
    root: Path,
    counts: dict[str, int],
    seed: int,
    image_size: tuple[int, int],
    progress: Progress,
) -> None:
    for folder in (*FOLDERS, "gt_sets"):
        (root / folder).mkdir()
    jobs = [(root, s, i, seed, image_size) for s, n in counts.items() for i in range(n)]
    for split, count in counts.items():
        ids = [_scene_id(split, i) for i in range(count)]
        (root / "gt_sets" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    progress.start("rendering scenes", len(jobs))
    for _ in _in_processes(jobs):
        progress.advance()


def _in_processes(
    jobs: list[tuple[Path, str, int, int, tuple[int, int]]],
) -> Iterator[None]:
    workers = max(1, min(MOST_WORKERS, os.cpu_count() or 1, len(jobs)))
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield from pool.map(_write_one, jobs, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_one(job: tuple[Path, str, int, int, tuple[int, int]]) -> None:
    root, split, index, seed, image_size = job
    scene = render_scene(scene_seed(split, seed, index), image_size)
    _save(root, _scene_id(split, index), scene)


def _scene_id(split: str, index: int) -> str:
    return f"{split}_{index:05d}"


def _save(root: Path, name: str, scene: Scene) -> None:
    """Write one scene; class numbers are shifted by one, 0 is ignore."""
    pictures = {
        "images": scene.image,
        "segmentation": np.where(scene.segmentation == 255, 0, scene.segmentation + 1),
        "edge": scene.boundary * 255,
        "normals": np.where(
            np.any(scene.normals, axis=-1, keepdims=True),
            np.round((scene.normals + 1) * 127.5),
            127,
        ),
        "saliency": scene.saliency * 255,
        "parts": scene.parts,
    }
    for folder, pixels in pictures.items():
        Image.fromarray(np.asarray(pixels).astype(np.uint8)).save(root / folder / f"{name}.png")
    np.save(root / "depth" / f"{name}.npy", scene.depth)
