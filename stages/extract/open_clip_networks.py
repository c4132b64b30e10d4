"""Teachers from open_clip: the image tower of a contrastive model, tapped at its blocks.

Letters: `B` batch, `C` channels, `H W` pixels, `h w` cells of a level's grid.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from stages.extract import checkpoints, timm_networks
from stages.extract.errors import TeacherError, UnknownTeacherError
from stages.extract.network import Network, Outline, Tapped
from store.errors import nearest

_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenClipSource:
    """`open_clip:<name>/<tag>`; the tag is empty where a local checkpoint stands for it."""

    name: str
    tag: str
    checkpoint: Path | Literal["random"] | None
    model_args: Mapping[str, Any]

    def outline(self) -> Outline:
        """Describe the image tower without its weights."""
        tower = self._skeleton().visual
        config = tower.preprocess_cfg | open_clip.get_pretrained_cfg(self.name, self.tag)
        native = tower.image_size
        return Outline(
            reductions=_reductions(tower, self._label),
            native=(native, native) if isinstance(native, int) else tuple(native),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            facts={
                "library": f"open_clip {open_clip.__version__}",
                "model": self.name,
                "tag": self.tag or None,
                "licence": None,  # open_clip states none; see the model's card
            },
        )

    def load(self, size: tuple[int, int], taps: tuple[int, ...]) -> Network:
        """Build the image tower for `size` (H, W), with its weights, up to the last tapped layer."""
        path: str | None
        if self.checkpoint is None:
            path, weights = self._download()
        elif isinstance(self.checkpoint, Path):
            checkpoints.check_file(self.checkpoint)
            path, weights = str(self.checkpoint), self.checkpoint.name
        else:
            path, weights = None, "random weights"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            try:
                model = self._create(pretrained=path, force_image_size=size)
            except checkpoints.READ_ERRORS as error:
                raise self._does_not_fit(path, error) from error
        tower = model.visual
        if isinstance(tower, TimmModel):
            timm_networks.cut_off(tower.trunk, taps)
            tap = partial(timm_networks.tap, tower.trunk, taps)
            return Network(module=tower.trunk, tap=tap, weights=weights)
        tower.prune_intermediate_layers(list(taps), prune_norm=True, prune_head=True)
        return Network(module=tower, tap=partial(_tap, tower, taps), weights=weights)

    @property
    def _label(self) -> str:
        return f"open_clip:{self.name}/{self.tag}".rstrip("/")

    def _skeleton(self) -> Any:
        """The whole model without memory behind its weights."""
        if open_clip.get_model_config(self.name) is None:
            hint = nearest(self.name, open_clip.list_models())
            raise UnknownTeacherError(f"open_clip has no model {self.name!r}; {hint}")
        tags = open_clip.list_pretrained_tags_by_model(self.name)
        if (self.tag or self.checkpoint is None) and self.tag not in tags:
            raise UnknownTeacherError(
                f"open_clip has no weights {self.tag!r} for {self.name}; {nearest(self.tag, tags)}"
            )
        try:
            return self._create(device="meta")
        except TypeError as error:
            raise TeacherError(f"model_args {dict(self.model_args)}: {error}") from error

    def _create(self, device: str = "cpu", **arguments: Any) -> Any:
        # open_clip only warns when the weights were trained with the other kind of GELU
        quick = bool(open_clip.get_pretrained_cfg(self.name, self.tag).get("quick_gelu"))
        options = {"force_quick_gelu": quick, "pretrained_text": False} | arguments
        with torch.device(device), _without_log():
            return open_clip.create_model(
                self.name, device=device, **(options | dict(self.model_args))
            )

    def _download(self) -> tuple[str, str]:
        config = open_clip.get_pretrained_cfg(self.name, self.tag)
        repository, _, filename = config.get("hf_hub", "").rpartition("/")
        wanted = config.get("url", "")
        if repository:
            wanted = checkpoints.hub_file(repository, filename or "open_clip_model.safetensors")
        try:
            return open_clip.download_pretrained(config), wanted
        except OSError as error:
            raise checkpoints.no_download(self._label, wanted, error) from error

    def _does_not_fit(self, path: str | None, error: Exception) -> TeacherError:
        if path is None:
            return TeacherError(f"{self._label}: {error}")
        known = set(self._skeleton().state_dict())
        given = set(checkpoints.read_state(Path(path)))
        return checkpoints.does_not_fit(self._label, path, given, known, known, error)


@contextmanager
def _without_log() -> Iterator[None]:
    """Silence open_clip, which reports our sketch without weights as a failure to load some."""

    def is_ours(record: logging.LogRecord) -> bool:
        return Path(record.pathname).parent != Path(open_clip.factory.__file__).parent

    root = logging.getLogger()  # the one that open_clip writes to
    root.addFilter(is_ours)
    try:
        yield
    finally:
        root.removeFilter(is_ours)


def _reductions(tower: Any, source: str) -> tuple[int, ...]:
    if isinstance(tower, TimmModel):
        return timm_networks.layer_reductions(tower.trunk, source)
    if isinstance(tower, VisionTransformer):
        return (tower.patch_size[0],) * len(tower.transformer.resblocks)
    raise TeacherError(
        f"{source} has an image tower of kind {type(tower).__name__}, which is not supported; timm "
        "may have it under another name, for example timm:resnet50_clip.openai"
    )


def _tap(tower: Any, taps: tuple[int, ...], images: Tensor) -> Tapped:
    outputs = tower.forward_intermediates(
        images, indices=list(taps), intermediates_only=True, output_extra_tokens=True
    )
    return outputs["image_intermediates"], outputs["image_intermediates_prefix"][-1][:, 0]
