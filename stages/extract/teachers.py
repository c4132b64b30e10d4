"""A teacher: a frozen network with its own preprocessing, "image batch in, levels out".

Letters: `B` batch, `C` channels, `H W` pixels of the teacher's input, `h w` cells of a level.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from stages.data.view import Box
from stages.extract.checkpoints import state_digest
from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError
from stages.extract.geometry import InputFrame
from stages.extract.levels import choose_taps, level_names
from stages.extract.network import Network, best_memory_format
from stages.extract.preprocess import Preprocessing, probe_box, probe_image
from stages.extract.provenance import choose_preprocessing, known_provenance, network_source
from store.spec import GLOBAL, LevelSpec, TeacherSpec

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a teacher says about a batch, float32 on its device.

    `levels` maps a level's name to B h w C, raw outputs without the network's final norm; `pooled`
    is B C, the class token after the last tapped block, None for networks that have none.
    """

    levels: Mapping[str, Tensor]
    pooled: Tensor | None

    def part(self, images: slice) -> "Features":
        """Return what is said about some of the images."""
        return Features(
            levels={name: values[images] for name, values in self.levels.items()},
            pooled=None if self.pooled is None else self.pooled[images],
        )

    def outputs(self) -> dict[str, Tensor]:
        """Return the levels, and the pooled output as `global` where there is one."""
        return {**self.levels, **({} if self.pooled is None else {GLOBAL: self.pooled})}


@runtime_checkable
class Teacher(Protocol):
    """What extraction needs; `spec` says which levels `__call__` gives, and from what."""

    @property
    def spec(self) -> TeacherSpec:
        """Name, levels and provenance, as they go into the store."""
        ...

    def preprocess(self, image: UInt8[np.ndarray, "rows columns 3"], box: Box) -> Tensor:
        """Return the input for the part `box` of an RGB image; runs in reading threads.

        Of one shape and dtype for all images, best uint8: what can be done on the device belongs
        into `__call__`.
        """
        ...

    def __call__(self, images: Shaped[Tensor, "B ..."]) -> Features:
        """Return the levels of a stack of preprocessed images, given on any device."""
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
        *,
        compiled: bool = False,
    ) -> None:
        self.memory_format = best_memory_format(network.module)
        network.module.eval().requires_grad_(requires_grad=False)
        network.module.to(device).to(memory_format=self.memory_format)
        self._network = network
        self._compiled = compiled
        self._tap = torch.compile(network.tap, dynamic=False) if compiled else network.tap
        self._names = names
        self._preprocessing = preprocessing
        self.preprocess = preprocessing  # no method: loading processes get it without the network
        self._dtype = _DTYPES[precision]
        self.device = device
        self.spec: TeacherSpec

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B h w 3"]) -> Features:
        """Return the levels of a batch, the cells over padding cut off."""
        pixels = images.to(self.device, non_blocking=True)
        inputs = self._preprocessing.normalise(pixels, self.memory_format)
        if self._compiled:
            inputs = _padded(inputs)
        with self._autocast():
            maps, pooled = self._tap(inputs)
        frame, count = self._preprocessing.frame, len(images)
        return Features(
            levels={
                name: _on_view(grid[:count], frame)
                for name, grid in zip(self._names, maps, strict=True)
            },
            pooled=None if pooled is None else pooled[:count].float(),
        )

    @property
    def reentrant(self) -> bool:
        """Whether threads may ask it at the same time."""
        return self._network.reentrant and not self._compiled

    def exact(self) -> "NetworkTeacher":
        """Return the same weights in float32, not compiled; nothing is copied."""
        teacher = NetworkTeacher(
            self._network, self._names, self._preprocessing, "fp32", self.device
        )
        teacher.spec = self.spec
        return teacher

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)


def load_teacher(
    name: str, config: TeacherConfig, image_size: tuple[int, int], device: torch.device
) -> NetworkTeacher:
    """Build a teacher for views of `image_size` (height, width) in pixels.

    One image passes through it, from which the grids of its levels are known.

    Raises:
        TeacherError: unknown model, weights or level, missing weights, a wrong checkpoint, or an
            input size that the network does not take.
    """
    source = network_source(config)
    outline = source.outline()
    taps = choose_taps(config.levels, outline.reductions)
    preprocessing = choose_preprocessing(config, outline, image_size)
    frame = preprocessing.frame
    names = level_names(taps, outline.reductions)
    try:
        network = source.load(frame.size, taps)
        weights_digest = state_digest(network.module.state_dict())
        teacher = NetworkTeacher(
            network, names, preprocessing, config.precision, device, compiled=config.compile
        )
        pixels = teacher.preprocess(probe_image(), probe_box(image_size))
        features = teacher(pixels[None])
    except (RuntimeError, AssertionError) as error:  # how the libraries refuse a size
        if config.compile and type(error).__module__.startswith("torch._"):  # the compiler's own
            raise TeacherError(
                f"{config.source} cannot be compiled here: {' '.join(str(error).split())[:300]}; "
                "install a C++ compiler (on CUDA, Triton), or set `compile: false`"
            ) from error
        height, width = frame.size
        raise TeacherError(
            f"{config.source} cannot be built or run for inputs of {height} x {width} pixels: "
            f"{str(error) or type(error).__name__}; try another `input_size:`"
        ) from error
    for (level, grid), tap in zip(features.levels.items(), taps, strict=True):
        _check_grid(config.source, level, grid, frame, outline.reductions[tap])
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
            **_arithmetic(teacher, config),
            **known_provenance(config, preprocessing, image_size),
        },
    )
    return teacher


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


def _arithmetic(teacher: NetworkTeacher, config: TeacherConfig) -> dict[str, str]:
    """Return what changes features in their last bits, where it is not the usual."""
    said = {}
    if teacher.memory_format == torch.channels_last:
        said["memory_format"] = "channels_last"
    if config.compile:
        said["compiled_by"] = f"torch {torch.__version__}"
    return said


def _padded(inputs: Tensor) -> Tensor:
    """Repeat the last image up to a power of two: a compiled network is made for each batch size.

    So there are few of them, and which one serves a batch follows from the batch alone.
    """
    missing = (1 << (len(inputs) - 1).bit_length()) - len(inputs)
    return torch.cat([inputs, inputs[-1:].expand(missing, -1, -1, -1)]) if missing else inputs


def _on_view(grid: Tensor, frame: InputFrame) -> Tensor:
    """B C h w -> B h w C, without the cells that lie on padding."""
    rows, columns = frame.cells((grid.shape[2], grid.shape[3]))
    return grid[:, :, :rows, :columns].permute(0, 2, 3, 1).float()


def _check_grid(source: str, level: str, grid: Tensor, frame: InputFrame, reduction: int) -> None:
    """Refuse a grid (1, h, w, C) that does not cover the image, cell by cell of `reduction`."""
    expected = tuple(side // reduction for side in frame.content)
    found = tuple(grid.shape[1:3])
    if found != expected:
        raise TeacherError(
            f"{source}: {level} answers with {found[0]} x {found[1]} cells, one per {reduction} "
            f"pixels of the image would be {expected[0]} x {expected[1]}. Such a network drops or "
            "adds a border, and its cells do not lie on the image; use another, or other `levels:`"
        )


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
