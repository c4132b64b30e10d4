"""A teacher: a frozen network with its own preprocessing, "image batch in, levels out".

Letters: `B` batch, `C` channels, `H W` pixels of the teacher's input, `h w` cells of a level.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from stages.data.view import Box, Resample
from stages.extract.checkpoints import state_digest
from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError
from stages.extract.geometry import InputFrame, plan_input
from stages.extract.levels import choose_taps, level_names
from stages.extract.network import Network, NetworkSource, Outline
from stages.extract.open_clip_networks import OpenClipSource
from stages.extract.preprocess import Preprocessing, probe_box, probe_digest, probe_image
from stages.extract.timm_networks import TimmSource
from store.spec import LevelSpec, TeacherSpec, canonical_json

CODE_VERSION = 1
"""Raise it when the same weights and settings give other features than before."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a teacher says about a batch, float32 on its device.

    `levels` maps a level's name to B h w C, raw outputs without the network's final norm; `pooled`
    is B C, the class token after the last tapped block, None for networks that have none.
    """

    levels: Mapping[str, Tensor]
    pooled: Tensor | None


@runtime_checkable
class Teacher(Protocol):
    """What extraction needs; `spec` says which levels `__call__` gives, and from what."""

    @property
    def spec(self) -> TeacherSpec:
        """Name, levels and provenance, as they go into the store."""
        ...

    def preprocess(
        self, image: UInt8[np.ndarray, "rows columns 3"], box: Box
    ) -> Float32[Tensor, "3 H W"]:
        """Return the input for the part `box` of an RGB image; runs in reading threads."""
        ...

    def __call__(self, images: Float32[Tensor, "B 3 H W"]) -> Features:
        """Return the levels of a batch of preprocessed images, given on any device."""
        ...


class NetworkTeacher:
    """A teacher made of a timm or open_clip network."""

    def __init__(
        self,
        network: Network,
        names: tuple[str, ...],
        preprocessing: Preprocessing,
        precision: str,
        device: torch.device,
    ) -> None:
        network.module.eval().requires_grad_(requires_grad=False).to(device)
        self._network = network
        self._names = names
        self._preprocessing = preprocessing
        self._dtype = _DTYPES[precision]
        self._device = device
        self.spec: TeacherSpec

    def preprocess(
        self, image: UInt8[np.ndarray, "rows columns 3"], box: Box
    ) -> Float32[Tensor, "3 H W"]:
        """Return the network's input for the part `box` of an RGB image."""
        return self._preprocessing(image, box)

    @torch.inference_mode()
    def __call__(self, images: Float32[Tensor, "B 3 H W"]) -> Features:
        """Return the levels of a batch, the cells over padding cut off."""
        with self._autocast():
            maps, pooled = self._network.tap(images.to(self._device))
        frame = self._preprocessing.frame
        return Features(
            levels={
                name: _on_view(grid, frame) for name, grid in zip(self._names, maps, strict=True)
            },
            pooled=None if pooled is None else pooled.float(),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)


def load_teacher(
    name: str, config: TeacherConfig, image_size: tuple[int, int], device: torch.device
) -> Teacher:
    """Build a teacher for views of `image_size` (height, width) in pixels.

    One image passes through it, from which the grids of its levels are known.

    Raises:
        TeacherError: unknown model, weights or level, missing weights, a wrong checkpoint, or an
            input size that the network does not take.
    """
    source = network_source(config)
    outline = source.outline()
    taps = choose_taps(config.levels, outline.reductions)
    preprocessing = _preprocessing(config, outline, image_size)
    frame = preprocessing.frame
    names = level_names(taps, outline.reductions)
    try:
        network = source.load(frame.size, taps)
        weights_digest = state_digest(network.module.state_dict())
        teacher = NetworkTeacher(network, names, preprocessing, config.precision, device)
        features = teacher(teacher.preprocess(probe_image(), probe_box(image_size))[None])
    except (RuntimeError, AssertionError) as error:  # how the libraries refuse a size
        height, width = frame.size
        raise TeacherError(
            f"{config.source} cannot be built or run for inputs of {height} x {width} pixels: "
            f"{str(error) or type(error).__name__}; try another `input_size:`"
        ) from error
    teacher.spec = TeacherSpec(
        name=name,
        levels=tuple(
            _level(level, grid, config.resolutions) for level, grid in features.levels.items()
        ),
        global_channels=None if features.pooled is None else features.pooled.shape[1],
        codec=config.codec,
        provenance={
            **outline.facts,
            "source": config.source,
            "config": config.asked(),
            "model_args": config.model_args,
            "weights": network.weights,
            "weights_sha256": weights_digest,
            "taps": taps,
            "precision": config.precision,
            **_foreseen(config, preprocessing, image_size),
        },
    )
    return teacher


def foreseen_provenance(config: TeacherConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return what a teacher's provenance must say if it were extracted now, as plain JSON.

    Only what is known without its weights in memory: how images are prepared, the version of our
    code, the digest of the checkpoint's file where that is on this machine.

    Raises:
        TeacherError: unknown model.
    """
    outline = network_source(config).outline()
    foreseen = _foreseen(config, _preprocessing(config, outline, image_size), image_size)
    known: dict[str, Any] = json.loads(canonical_json(foreseen))
    return known


def _foreseen(
    config: TeacherConfig, preprocessing: Preprocessing, image_size: tuple[int, int]
) -> dict[str, Any]:
    checkpoint = {}
    if isinstance(config.checkpoint, Path) and config.checkpoint.is_file():
        with config.checkpoint.open("rb") as file:
            checkpoint["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "preprocessing": _described(preprocessing),
        "probe_sha256": probe_digest(preprocessing, image_size),
        "code_version": CODE_VERSION,
        **checkpoint,
    }


def _preprocessing(
    config: TeacherConfig, outline: Outline, image_size: tuple[int, int]
) -> Preprocessing:
    multiple = max(outline.reductions)
    return Preprocessing(
        frame=plan_input(config.input_size, image_size, outline.native, multiple),
        mean=config.mean or outline.mean,
        std=config.std or outline.std,
        interpolation=config.interpolation or _known_interpolation(outline),
    )


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first CUDA device, else the CPU.

    Raises:
        TeacherError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= available[device.type]:
        raise TeacherError(
            f"device: there is no {name} on this machine (or torch was built without it); "
            "use `auto` or `cpu`"
        )
    return device


def network_source(config: TeacherConfig) -> NetworkSource:
    """Return the model that a configuration names; nothing is built yet."""
    library, _, name = config.source.partition(":")
    if library == "timm":
        return TimmSource(name=name, checkpoint=config.checkpoint, model_args=config.model_args)
    model, _, tag = name.partition("/")
    return OpenClipSource(
        name=model, tag=tag, checkpoint=config.checkpoint, model_args=config.model_args
    )


def _known_interpolation(outline: Outline) -> Resample:
    known: tuple[Resample, ...] = get_args(Resample)
    for name in known:
        if outline.interpolation == name:
            return name
    raise TeacherError(
        f"the model states interpolation {outline.interpolation!r}; set the teacher's "
        f"`interpolation:` to one of {', '.join(known)}"
    )


def _on_view(grid: Tensor, frame: InputFrame) -> Tensor:
    """B C h w -> B h w C, without the cells that lie on padding."""
    rows, columns = frame.cells((grid.shape[2], grid.shape[3]))
    return grid[:, :, :rows, :columns].permute(0, 2, 3, 1).float()


def _level(
    name: str, grid: Tensor, resolutions: Sequence[Literal["native"] | tuple[int, int]]
) -> LevelSpec:
    _, rows, columns, channels = grid.shape
    stored = {
        (rows, columns) if asked == "native" else (min(asked[0], rows), min(asked[1], columns))
        for asked in resolutions
    }
    return LevelSpec(
        name=name,
        grid=(rows, columns),
        channels=channels,
        stored=tuple(sorted(stored, reverse=True)),
    )


def _described(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "input_size": preprocessing.frame.size,
        "content_size": preprocessing.frame.content,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
    }
