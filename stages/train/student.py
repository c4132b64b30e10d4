"""The student of SAK (arXiv 2410.14633, section 3): stem, adapter paths, routers, heads.

Shapes: `B` batch, `H W` image pixels, `h w` the stem's grid, `N = h w` patch tokens, `D` stem
width, `C` channels of a teacher or task, `E` experts = 1 + teachers.
Parameter names follow the published checkpoints.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stages.data.tasks import Task
from stages.train.adapter import Adapter, initialise_linear, path_states
from stages.train.config import StudentConfig
from stages.train.heads import DenseHead
from stages.train.router import MixtureOfRepresentations, mix
from stages.train.stem import (
    StudentError,
    check_image_size,
    create_stem,
    normalisation,
    stem_states,
    tapped_blocks,
)

PARTS = {
    "vit": "stem",
    "tsap": "paths",
    "out_norms": "norms",
    "ts_aligners": "aligners",
    "mor": "routers",
    "heads": "heads",
}
STEM = "stem"
"""Name of the stem among the representations; the others are named after teachers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentOutput:
    """What one forward pass gives."""

    paths: dict[str, list[Tensor]]
    """Per teacher, per level: `B h w C`, in the teacher's width where aligners exist."""
    tasks: dict[str, Tensor]
    """Per task: logits `B C H W` float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Representation:
    """Patch tokens at the tapped levels, each `B N D`."""

    stem: list[Tensor]
    paths: dict[str, list[Tensor]]


def level_key(block: int, name: str) -> str:
    """Name a module that belongs to a tapped block and to a teacher or task."""
    return f"{block}_{name}"


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay `B N D` patch tokens out as `B h w D`."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


class Student(nn.Module):
    """Teacher-agnostic stem with a path per teacher, a router per (level, task), task heads.

    Build it with `build_student`. Without teachers it is the plain ViT with heads.
    """

    def __init__(
        self,
        *,
        vit: VisionTransformer,
        image_size: tuple[int, int],
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
        levels: Sequence[int],
        adapter_ratio: int,
        teachers: Mapping[str, Sequence[int]],
        tasks: Sequence[Task],
        aligners: bool,
        router: str,
    ) -> None:
        super().__init__()
        width = int(vit.embed_dim)
        self.image_size = image_size
        self.width = width
        self.levels = tuple(levels)
        self.teachers = tuple(teachers)
        self.task_names = tuple(task.name for task in tasks)
        self.mean, self.std = normalisation
        self.vit = vit
        self.tsap = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    Adapter(width, adapter_ratio) for _ in range(len(vit.blocks) + 1)
                )
                for name in teachers
            }
        )
        taps = [(block, name) for block in self.levels for name in teachers]
        self.out_norms = nn.ModuleDict(
            {level_key(block, name): nn.LayerNorm(width) for block, name in taps}
        )
        self.ts_aligners = nn.ModuleDict()
        for index, block in enumerate(self.levels):
            for name, channels in teachers.items():
                if aligners and channels[index] != width:
                    aligner = nn.Linear(width, channels[index])
                    self.ts_aligners[level_key(block, name)] = aligner
        initialise_linear(self.ts_aligners)
        routed = [(block, task.name) for block in self.levels for task in tasks]
        self.mor = nn.ModuleDict(
            {
                level_key(block, name): MixtureOfRepresentations(
                    width, 1 + len(teachers), noisy=router == "sak"
                )
                for block, name in routed
                if router != "sum" and teachers
            }
        )
        self.heads = nn.ModuleDict(
            {task.name: DenseHead(width, len(self.levels), task.channels) for task in tasks}
        )

    def forward(self, images: Tensor, distillation: bool = True) -> StudentOutput:
        """Run the student on normalised images `B 3 H W` float32.

        Without `distillation` no aligned features are made (`paths` is empty), which is how a
        student is used after training. Heads and adapters that do not exist cost nothing.

        Raises:
            StudentError: H or W is no multiple of the patch size.
        """
        height, width = images.shape[-2:]
        tokens = self._represent(images)
        grid = self.vit.patch_embed.dynamic_feat_size((height, width))
        paths = self._aligned(tokens, grid) if distillation else {}
        levels = [self._mixed(tokens, index) for index in range(len(self.levels))]
        tasks = {}
        for name, head in self.heads.items():
            tasks[name] = head([to_grid(level[name], grid) for level in levels], (height, width))
        return StudentOutput(paths=paths, tasks=tasks)

    def representations(self, images: Tensor, aligned: bool = False) -> dict[str, list[Tensor]]:
        """Return `stem` and each path, per tapped block `B h w D`: what the routers mix.

        With `aligned`, paths pass their aligners, where there are any, into the teacher's width.

        Raises:
            StudentError: H or W is no multiple of the patch size.
        """
        tokens = self._represent(images)
        grid = self.vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        if aligned:
            paths = self._aligned(tokens, grid)
        else:
            paths = {
                name: [to_grid(x, grid) for x in levels] for name, levels in tokens.paths.items()
            }
        return {STEM: [to_grid(level, grid) for level in tokens.stem], **paths}

    @torch.no_grad()
    def gates(self, images: Tensor) -> dict[str, Tensor]:
        """Return each task's gates `B levels E` (the stem first, then the teachers in order).

        Empty for a student without routers. In training mode the noise of the pixels is
        averaged out over the image.
        """
        tokens = self._represent(images)
        return {
            task: torch.stack(
                [
                    self.mor[level_key(block, task)](tokens.stem[index]).mean(dim=1)
                    for index, block in enumerate(self.levels)
                ],
                dim=1,
            )
            for task in (self.task_names if self.mor else ())
        }

    def parameter_counts(self) -> dict[str, int]:
        """Count parameters per part; the sum without `aligners` is what runs after training."""
        return {
            label: sum(p.numel() for p in self.get_submodule(part).parameters())
            for part, label in PARTS.items()
        }

    def _represent(self, images: Tensor) -> _Representation:
        check_image_size(self.vit, (images.shape[-2], images.shape[-1]))
        prefix = self.vit.num_prefix_tokens
        states = stem_states(self.vit, images)
        stem = [states[block + 1][:, prefix:] for block in self.levels]
        paths = {}
        for teacher, adapters in self.tsap.items():
            assert isinstance(adapters, nn.ModuleList)
            path = path_states(adapters, states)
            paths[teacher] = [
                self.out_norms[level_key(block, teacher)](path[block + 1][:, prefix:])
                for block in self.levels
            ]
        return _Representation(stem=stem, paths=paths)

    def _aligned(self, tokens: _Representation, grid: tuple[int, int]) -> dict[str, list[Tensor]]:
        aligned: dict[str, list[Tensor]] = {}
        for teacher, levels in tokens.paths.items():
            keys = [level_key(block, teacher) for block in self.levels]
            aligned[teacher] = [
                to_grid(self.ts_aligners[key](level) if key in self.ts_aligners else level, grid)
                for key, level in zip(keys, levels, strict=True)
            ]
        return aligned

    def _mixed(self, tokens: _Representation, index: int) -> dict[str, Tensor]:
        """Return the `B N D` tokens that each task's head sees at one level."""
        experts = [tokens.stem[index], *(path[index] for path in tokens.paths.values())]
        if self.mor:
            routers = [self.mor[level_key(self.levels[index], task)] for task in self.task_names]
            mixed = mix(experts, [router(tokens.stem[index]) for router in routers])
            return dict(zip(self.task_names, mixed, strict=True))
        total = torch.stack(experts).sum(dim=0) if len(experts) > 1 else experts[0]
        return dict.fromkeys(self.task_names, total)


def build_student(
    config: StudentConfig,
    image_size: tuple[int, int],
    teachers: Mapping[str, Sequence[int]],
    tasks: Sequence[Task],
    *,
    aligners: bool = True,
) -> Student:
    """Build a student for images of `image_size` (height, width).

    `teachers` maps each teacher to the channels of its levels: level k of the student is matched
    with level k of the teacher. `aligners=False` is for a student that is never distilled.

    Raises:
        StudentError: the parts do not fit together.
    """
    vit = create_stem(config, image_size)
    levels = tapped_blocks(config.levels, len(vit.blocks))
    for name, channels in teachers.items():
        good = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) is not None and name != STEM
        if not good or hasattr(nn.ModuleDict, name):
            raise StudentError(
                f"teacher name {name!r} cannot be used: expected a letter, then letters, digits, "
                f"'_' or '-', no Python method name and not '{STEM}'; rename it under `teachers`"
            )
        if len(channels) != len(levels):
            raise StudentError(
                f"teacher {name!r} has {len(channels)} levels, the student has {len(levels)} "
                f"(blocks {list(levels)}); set the same number of levels for both"
            )
    return Student(
        vit=vit,
        image_size=image_size,
        normalisation=normalisation(config),
        levels=levels,
        adapter_ratio=config.adapter_ratio,
        teachers=teachers,
        tasks=tasks,
        aligners=aligners,
        router=config.router,
    )
