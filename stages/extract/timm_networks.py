"""Teachers from timm: built, loaded, cut and tapped through its public functions.

Letters: `B` batch, `C` channels, `H W` pixels, `h w` cells of a level's grid.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import timm.models
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from stages.extract import checkpoints
from stages.extract.errors import MissingWeightsError, TeacherError, UnknownTeacherError
from stages.extract.network import Network, Outline, Tapped
from store.errors import nearest

_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmSource:
    """`timm:<name>`, where the name may end in `.tag`."""

    name: str
    checkpoint: Path | Literal["random"] | None
    model_args: Mapping[str, Any]

    def outline(self) -> Outline:
        """Describe the network without its weights."""
        model = self._skeleton()
        config = model.pretrained_cfg
        _, *trained_at = config["input_size"]
        return Outline(
            reductions=layer_reductions(model, f"timm:{self.name}"),
            native=_pair(self.model_args.get("img_size", trained_at)),
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            facts={
                "library": f"timm {timm.__version__}",
                "model": self.name.partition(".")[0],
                "tag": config.get("tag") if self._published else None,
                "licence": config.get("license") if self._published else None,
            },
        )

    def load(self, size: tuple[int, int], taps: tuple[int, ...]) -> Network:
        """Build the network for `size` (H, W), with its weights, up to the last tapped layer."""
        fixed = bool(self._skeleton().pretrained_cfg.get("fixed_input_size"))
        # timm's mark for constructors that take img_size; it then resamples position embeddings
        arguments = {"img_size": size} if fixed else {}
        arguments |= self.model_args
        model: Any
        if self.checkpoint is None:
            model, weights = self._download(arguments)
        elif isinstance(self.checkpoint, Path):
            model, weights = self._read(self.checkpoint, arguments, taps), self.checkpoint.name
        else:
            model, weights = _random(self.name, arguments), "random weights"
        if _pair(arguments.get("img_size", size)) != size:
            model.set_input_size(img_size=size)
        cut_off(model, taps)
        return Network(module=model, tap=partial(tap, model, taps), weights=weights)

    @property
    def _published(self) -> bool:
        """Whether the weights are timm's: downloaded, or a local copy of a tag that is named."""
        return self.checkpoint is None or (isinstance(self.checkpoint, Path) and "." in self.name)

    def _skeleton(self) -> Any:
        """The model without memory behind its weights; `Any`, for timm adds attributes freely."""
        architecture, _, tag = self.name.partition(".")
        if not timm.is_model(architecture):
            hint = nearest(architecture, timm.list_models(), limit=10_000)
            raise UnknownTeacherError(f"timm has no model {architecture!r}; {hint}")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise UnknownTeacherError(
                f"timm has no weights {tag!r} for {architecture}; {nearest(tag, tags)}"
            )
        try:
            with torch.device("meta"):
                return timm.create_model(self.name, pretrained=False, **self.model_args)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise TeacherError(f"model_args {dict(self.model_args)}: {reason}") from error

    def _download(self, arguments: Mapping[str, Any]) -> tuple[nn.Module, str]:
        config = timm.models.get_pretrained_cfg(self.name)
        if config is None or not config.has_weights:
            raise MissingWeightsError(
                f"timm publishes no weights for {self.name}; set the teacher's `checkpoint:`"
            )
        if config.hf_hub_id:
            filename = config.hf_hub_filename or "model.safetensors"
            wanted = checkpoints.hub_file(config.hf_hub_id, filename)
        else:
            wanted = str(config.url)
        try:
            return timm.create_model(self.name, pretrained=True, **arguments), wanted
        except (OSError, EntryNotFoundError) as error:
            raise checkpoints.no_download(f"timm:{self.name}", wanted, error) from error

    def _read(self, path: Path, arguments: Mapping[str, Any], taps: tuple[int, ...]) -> Any:
        """Load a local file as timm loads its own: same conversions, and strictly.

        A file may lack what is cut off later (or hold it in another shape, as a classifier of
        other classes); zeros stand in for that part, for timm would refuse the file without it.
        """
        state = checkpoints.read_state(path)
        skeleton = self._skeleton()
        whole, classes = skeleton.state_dict(), getattr(skeleton, "num_classes", None)
        cut_off(skeleton, taps)
        needed = set(skeleton.state_dict())
        given = set(state)
        if needed <= given:  # names are timm's own; else timm's conversion decides what is what
            unused = {key: value for key, value in whole.items() if key not in needed}
            state |= {key: torch.zeros(value.shape) for key, value in unused.items()}
        overlay = {"state_dict": state, "label_offset": 0, "num_classes": classes}
        model: Any
        try:
            model = timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
        except (RuntimeError, LookupError, ValueError) as error:
            raise checkpoints.does_not_fit(
                f"timm:{self.name}", str(path), given, set(whole), needed, error
            ) from error
        del model.pretrained_cfg["state_dict"]  # timm keeps a copy of all weights there
        return model


def layer_reductions(model: Any, source: str) -> tuple[int, ...]:
    """Return input pixels per grid cell for each layer that a timm model can give.

    Raises:
        TeacherError: the model gives no intermediate features.
    """
    information = getattr(model, "feature_info", None)
    if not information or not hasattr(model, "forward_intermediates"):
        raise TeacherError(f"{source} gives no intermediate features, choose another model")
    return tuple(entry["reduction"] for entry in getattr(information, "info", information))


def cut_off(model: Any, taps: tuple[int, ...]) -> None:
    """Drop the head, the final norm and all layers after the last tapped one, in place."""
    model.prune_intermediate_layers(list(taps), prune_norm=True, prune_head=True)


def tap(model: Any, taps: tuple[int, ...], images: Tensor) -> Tapped:
    """Return the tapped layers' raw outputs (no norm) and the last one's class token, if any."""
    options = {"norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    if not _has_class_token(model):
        return model.forward_intermediates(images, indices=list(taps), **options), None
    pairs = model.forward_intermediates(
        images, indices=list(taps), return_prefix_tokens=True, **options
    )
    return [grid for grid, _ in pairs], pairs[-1][1][:, 0]


def _has_class_token(model: Any) -> bool:
    parameters = inspect.signature(model.forward_intermediates).parameters
    return getattr(model, "cls_token", None) is not None and "return_prefix_tokens" in parameters


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _random(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model
