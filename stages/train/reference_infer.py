"""What student a reference checkpoint is of, read off the names and shapes of its weights.

`N` patch tokens, `D` stem width, `E` experts = 1 + teachers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.train.config import StudentConfig
from stages.train.reference_file import ReferenceError
from stages.train.reference_names import found_in
from stages.train.saving import StudentDescription

PUBLISHED_STEMS = {
    (384, 12): "vit_small_patch16_384",
    (768, 12): "vit_base_patch16_384",
    (1024, 24): "vit_large_patch16_384",
}
"""Width and depth of the reference's stems."""
HEAD_WIDTH = 64
"""Channels of an attention head in every published ViT; weights do not tell."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the reference normalises every image with, stem and teachers alike."""
REQUIRED = (
    "vit.pos_embed",
    "vit.patch_embed.proj.weight",
    "vit.blocks.0.mlp.fc1.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstated:
    """What weights alone may not tell; None is left to be inferred."""

    image_size: tuple[int, int] | None = None
    """Height and width in pixels, where the stem's grid is not square."""
    heads: int | None = None
    """Attention heads, where they are not of 64 channels."""
    teachers: tuple[str, ...] | None = None
    """Their order, which the routers' gates follow; safetensors files lose it."""


def infer(weights: Mapping[str, Tensor], unstated: Unstated, ordered: bool) -> StudentDescription:
    """Describe the student of weights under our names; whether all fits is for the caller to check.

    `ordered` says that names come in the order of the model.

    Raises:
        ReferenceError: the stem, a teacher or the levels cannot be made out.
    """
    if absent := [name for name in REQUIRED if name not in weights or weights[name].ndim < 2]:
        raise ReferenceError(f"no SAK student: {', '.join(absent)} are absent or misshapen")
    width = int(weights["vit.pos_embed"].shape[-1])
    levels = sorted({int(block) for block in found_in(weights, r"(?:out_norms|mor)\.(\d+)_")})
    teachers = _teachers(weights, unstated, ordered)
    if not levels or not teachers:
        raise ReferenceError("no SAK student: no adapter paths (tsap.*) or no tapped blocks")
    aligners = bool(found_in(weights, r"(ts_aligners)\."))
    student = {
        **_stem(weights, width, unstated.heads),
        "levels": levels,
        "adapter_ratio": _adapter_ratio(weights, width, teachers),
        "router": _router(weights, len(teachers)),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return StudentDescription(
        student=StudentConfig.model_validate(student),
        image_size=_image_size(weights, unstated.image_size),
        teachers={
            name: tuple(_channels(weights, block, name, width) for block in levels)
            for name in teachers
        },
        tasks=tuple(_task(name, weights) for name in found_in(weights, r"heads\.([^.]+)\.")),
        aligners=aligners,
    )


def _stem(weights: Mapping[str, Tensor], width: int, heads: int | None) -> dict[str, object]:
    depth = len(found_in(weights, r"vit\.blocks\.(\d+)\."))
    patch = int(weights["vit.patch_embed.proj.weight"].shape[-1])
    hidden = int(weights["vit.blocks.0.mlp.fc1.weight"].shape[0])
    if heads is None and width % HEAD_WIDTH:
        raise ReferenceError(
            f"a stem of width {width} has no heads of {HEAD_WIDTH} channels; say how many heads"
        )
    heads = heads or width // HEAD_WIDTH
    if width % heads:
        raise ReferenceError(f"{heads} heads do not divide the stem's width {width}")
    usual = (patch, hidden, heads) == (16, 4 * width, width // HEAD_WIDTH)
    if usual and (width, depth) in PUBLISHED_STEMS:
        return {"model": PUBLISHED_STEMS[width, depth]}
    arguments: dict[str, object] = {
        "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads
    }  # fmt: skip
    if hidden != 4 * width:
        arguments["mlp_ratio"] = hidden / width
    return {"model": PUBLISHED_STEMS[768, 12], "model_args": arguments}


def _image_size(weights: Mapping[str, Tensor], stated: tuple[int, int] | None) -> tuple[int, int]:
    patch = int(weights["vit.patch_embed.proj.weight"].shape[-1])
    tokens = int(weights["vit.pos_embed"].shape[1]) - 1
    if stated is not None:
        if stated[0] // patch * (stated[1] // patch) != tokens:
            raise ReferenceError(
                f"images of {stated[0]} x {stated[1]} have {stated[0] // patch} x "
                f"{stated[1] // patch} patches, the file's position embedding has {tokens}"
            )
        return stated
    side = math.isqrt(tokens)
    if side * side != tokens:
        sizes = [f"{patch * a}x{patch * tokens // a}" for a in range(side // 2 + 1, side + 1)
                 if a and tokens % a == 0]  # fmt: skip
        raise ReferenceError(
            f"{tokens} patch tokens are no square grid; say the image size, height by width"
            + (f", such as {sizes[-1]}" if sizes else "")
        )
    return side * patch, side * patch


def _teachers(weights: Mapping[str, Tensor], unstated: Unstated, ordered: bool) -> tuple[str, ...]:
    found = found_in(weights, r"tsap\.([^.]+)\.")
    stated = unstated.teachers
    if stated is not None and sorted(stated) != sorted(found):
        raise ReferenceError(
            f"the file has the teachers {', '.join(sorted(found))}, not {', '.join(stated)}"
        )
    if stated is None and not ordered and len(found) > 1 and found_in(weights, r"(mor)\."):
        raise ReferenceError(
            f"safetensors keeps no order, and the routers' gates follow that of the teachers: "
            f"say the order of {', '.join(found)}"
        )
    return stated or found


def _adapter_ratio(weights: Mapping[str, Tensor], width: int, teachers: tuple[str, ...]) -> int:
    down = weights.get(f"tsap.{teachers[0]}.0.down.weight") if teachers else None
    return max(1, width // down.shape[0]) if down is not None and down.numel() else 1


def _router(weights: Mapping[str, Tensor], teachers: int) -> str:
    """`2E` scores are logits and noise, `E` logits alone; the strict check finds anything else."""
    scores = [v.shape[0] for k, v in weights.items() if k.startswith("mor.") and k[-6:] == "3.bias"]
    if not scores:
        return "sum" if found_in(weights, r"(heads)\.") else "sak"
    return "sak-noiseless" if scores[0] == 1 + teachers else "sak"


def _channels(weights: Mapping[str, Tensor], block: int, teacher: str, width: int) -> int:
    aligner = weights.get(f"ts_aligners.{block}_{teacher}.bias")
    if aligner is not None and len(aligner) == width:
        raise ReferenceError(
            f"ts_aligners.{block}_{teacher} maps {width} channels to as many; here aligners exist "
            "only where widths differ, so this student cannot be held"
        )
    return width if aligner is None else len(aligner)


def _task(name: str, weights: Mapping[str, Tensor]) -> Task:
    known = {task.name: task for task in (*PASCAL_TASKS, *NYUD_TASKS)}
    channels = weights.get(f"heads.{name}.last_conv.bias")
    if channels is None:
        raise ReferenceError(f"heads.{name}.last_conv.bias is missing")
    return replace(known[name], channels=len(channels))
