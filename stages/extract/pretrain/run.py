"""The training loop of the small teachers, and their weights' file."""

import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.layers.attention import Attention
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stages.extract.pretrain.config import PretrainConfig
from stages.extract.pretrain.contrastive import LanguageImageContrast
from stages.extract.pretrain.masked import MaskedAutoencoder
from stages.extract.pretrain.promptable import PromptableMasks
from stages.extract.pretrain.scenes_cache import SceneCache, row_batches
from stages.progress import Progress

_LOG = logging.getLogger(__name__)
_CLIP_NORM = 1.0
_SMOOTHING = 0.98  # of the loss that is shown and reported


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSummary:
    """What a card says about a run."""

    parameters: int  # of the encoder
    scenes: int
    steps: int
    first_loss: float
    last_loss: float  # smoothed over about fifty steps
    seconds: float


def pretrain(
    config: PretrainConfig, scenes: SceneCache, out: Path, progress: Progress
) -> PretrainSummary:
    """Train one small teacher on `scenes` and write its encoder to `out`, a safetensors file.

    The file holds the encoder only, under timm's names, so that `timm.create_model` with the
    recipe's `model_args` and `num_classes=0` loads it strictly.
    """
    torch.manual_seed(config.seed)
    encoder = timm.create_model(config.model, num_classes=0, **config.model_args)
    assert isinstance(encoder, VisionTransformer | ConvNeXt | ResNet)
    objective = build_objective(config, encoder, scenes)
    for module in objective.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # its backward pass takes twice as long on the CPU
    progress.start(config.objective, config.steps)
    started = time.monotonic()
    first, last = _train(config, objective, scenes, progress)
    seconds = time.monotonic() - started
    save_encoder(encoder, out)
    summary = PretrainSummary(
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        scenes=len(scenes),
        steps=config.steps,
        first_loss=first,
        last_loss=last,
        seconds=seconds,
    )
    _LOG.info("%s", summary)
    return summary


def build_objective(
    config: PretrainConfig, encoder: VisionTransformer | ConvNeXt | ResNet, scenes: SceneCache
) -> nn.Module:
    """Put the objective's own parts around an encoder."""
    match config.objective:
        case "masked":
            assert isinstance(encoder, VisionTransformer)
            return MaskedAutoencoder(encoder)
        case "contrastive":
            assert isinstance(encoder, ResNet)
            return LanguageImageContrast(encoder, scenes.captions, config.image_size)
        case "promptable":
            assert isinstance(encoder, ConvNeXt)
            return PromptableMasks(encoder, config.image_size)


def save_encoder(encoder: VisionTransformer | ConvNeXt | ResNet, out: Path) -> None:
    """Write the weights atomically: matrices in float16, vectors in float32.

    What lies behind the last level (the head) was not trained and is left out.
    """
    encoder.prune_intermediate_layers()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    weights = {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in encoder.state_dict().items()
    }
    save_file(weights, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(out)


def _train(
    config: PretrainConfig, objective: nn.Module, scenes: SceneCache, progress: Progress
) -> tuple[float, float]:
    optimizer = _build_optimizer(config, objective)
    generator = torch.Generator().manual_seed(config.seed)
    data_config = resolve_model_data_config(objective.encoder)  # type: ignore[no-untyped-call]
    mean, deviation = torch.tensor(data_config["mean"]), torch.tensor(data_config["std"])
    rows = row_batches(len(scenes), config.batch_size, config.seed)
    first = smooth = 0.0
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _share_of_peak(step, config)
        batch = scenes.batch(next(rows), step, mean, deviation)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = objective(batch, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(objective.parameters(), _CLIP_NORM)
        optimizer.step()
        value = loss.item()
        first = first or value
        smooth = _SMOOTHING * smooth + (1 - _SMOOTHING) * value if step else value
        progress.advance(note=f"loss {smooth:.3f}")
    return first, smooth


def _build_optimizer(config: PretrainConfig, objective: nn.Module) -> torch.optim.Optimizer:
    matrices = [weight for weight in objective.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in objective.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _share_of_peak(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
