"""Our student against the reference's computation, done again here on the raw weights.

`reference_forward` is written from the paper's formulas with torch.nn.functional alone and shares
nothing with the student: it reads a state dict under the published names. Shapes: `B` batch,
`N` patch tokens, `D` stem width, `h w` the stem's grid, `H W` image pixels.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.train.config import StudentConfig
from stages.train.reference import import_reference
from stages.train.reference_infer import Unstated
from stages.train.reference_names import to_reference
from stages.train.saving import load_student
from stages.train.student import Student, build_student

TOLERANCE = 1e-5
"""Largest |difference| over the largest |value| of the reference's tensor, float32."""
TEACHERS = ("dinov2", "clip", "sam")
Weights = dict[str, Tensor]
Tensors = dict[str, Tensor]


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def indices(w: Weights, pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in w if (found := re.match(pattern, name))})


def stem_tokens(w: Weights, images: Tensor, heads: int) -> list[Tensor]:
    """x_0 and the output of every block, `B 1+N D`."""
    kernel = w["vit.patch_embed.proj.weight"]
    patches = F.conv2d(images, kernel, w["vit.patch_embed.proj.bias"], stride=kernel.shape[-1])
    tokens = patches.flatten(2).transpose(1, 2)
    batch, count, width = tokens.shape
    classes = w["vit.cls_token"].expand(batch, 1, width)
    states = [torch.cat([classes, tokens], dim=1) + w["vit.pos_embed"]]
    for index in indices(w, r"vit\.blocks\.(\d+)\."):
        name, x = f"vit.blocks.{index}", states[-1]
        qkv = affine(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x, 1e-6))
        q, k, v = qkv.view(batch, 1 + count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.transpose(-2, -1) / (width / heads) ** 0.5, dim=-1)
        x = x + affine(w, f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(affine(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x, 1e-6)))
        states.append(x + affine(w, f"{name}.mlp.fc2", hidden))
    return states


def adapter(w: Weights, name: str, z: Tensor) -> Tensor:
    return z + w[f"{name}.scale"] * affine(w, f"{name}.up", F.gelu(affine(w, f"{name}.down", z)))


def path_features(w: Weights, teacher: str, states: list[Tensor]) -> dict[int, Tensor]:
    """Normalised path output at each tapped block, `B N D`."""
    tapped = indices(w, r"out_norms\.(\d+)_")
    features = {}
    r = adapter(w, f"tsap.{teacher}.0", states[0])
    for index, x in enumerate(states[1:]):
        r = adapter(w, f"tsap.{teacher}.{index + 1}", r + x)
        if index in tapped:
            features[index] = norm(w, f"out_norms.{index}_{teacher}", r[:, 1:], 1e-5)
    return features


def gates(w: Weights, block: int, task: str, tokens: Tensor, experts: int) -> Tensor:
    """Gates `B E` of an image in eval mode: the clean half of the scores."""
    name = f"mor.{block}_{task}.router.module"
    hidden = F.gelu(norm(w, f"{name}.1", affine(w, f"{name}.0", tokens), 1e-5))
    return F.softmax(affine(w, f"{name}.3", hidden).mean(dim=1)[:, :experts], dim=-1)


def decode(w: Weights, task: str, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Logits `B C H W` of `B D h w` levels."""
    quarter = (size[0] // 4, size[1] // 4)
    name = f"heads.{task}"
    reduced = []
    for k, level in enumerate(levels):
        channels = affine(w, f"{name}.linears.{k}", level.flatten(2).transpose(1, 2))
        grid = channels.transpose(1, 2).unflatten(2, level.shape[-2:])
        reduced.append(F.interpolate(grid, size=quarter, mode="bilinear", align_corners=False))
    fuse = f"{name}.linear_fuse"
    x = F.conv2d(torch.cat(reduced, 1), w[f"{fuse}.0.weight"], w[f"{fuse}.0.bias"], padding=1)
    statistics = (w[f"{fuse}.1.running_mean"], w[f"{fuse}.1.running_var"])
    x = F.gelu(F.batch_norm(x, *statistics, w[f"{fuse}.1.weight"], w[f"{fuse}.1.bias"]))
    x = F.conv2d(x, w[f"{name}.last_conv.weight"], w[f"{name}.last_conv.bias"])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def reference_forward(weights: Weights, images: Tensor, heads: int) -> Tensors:
    """Every intermediate that the reference has, by name."""
    w = {name.removeprefix("backbone."): value for name, value in weights.items()}
    size = (images.shape[-2], images.shape[-1])
    patch = w["vit.patch_embed.proj.weight"].shape[-1]
    grid = (size[0] // patch, size[1] // patch)
    states = stem_tokens(w, images, heads)
    out = {f"stem {block}": states[block + 1] for block in indices(w, r"out_norms\.(\d+)_")}
    features = {teacher: path_features(w, teacher, states) for teacher in TEACHERS}
    for teacher, levels in features.items():
        for block, level in levels.items():
            key = f"ts_aligners.{block}_{teacher}"
            aligned = affine(w, key, level) if f"{key}.weight" in w else level
            out[f"path {teacher} {block}"] = aligned.unflatten(1, grid)
    tasks = {found[1]: None for name in w if (found := re.match(r"heads\.([^.]+)", name))}
    for task in tasks:
        mixed = []
        for block in indices(w, r"mor\.(\d+)_"):
            tokens = states[block + 1][:, 1:]
            experts = torch.stack([tokens, *(features[name][block] for name in TEACHERS)], dim=1)
            gate = gates(w, block, task, tokens, len(TEACHERS) + 1)
            out[f"gates {task} {block}"] = gate
            mixture = (experts * gate[:, :, None, None]).sum(dim=1)
            mixed.append(mixture.transpose(1, 2).unflatten(2, grid))
        out[f"logits {task}"] = decode(w, task, mixed, size)
    return out


def our_forward(student: Student, images: Tensor) -> Tensors:
    """The same, as our student gives it."""
    names = {"segmentation": "semseg", "parts": "human_parts", "saliency": "sal",
             "boundary": "edge"}  # fmt: skip
    tokens: Tensors = {}
    hooks = [
        student.vit.blocks[block].register_forward_hook(
            lambda _, __, output, block=block: tokens.__setitem__(f"stem {block}", output)
        )
        for block in student.levels
    ]
    output = student(images)
    for hook in hooks:
        hook.remove()
    for teacher, levels in output.paths.items():
        for block, level in zip(student.levels, levels, strict=True):
            tokens[f"path {teacher} {block}"] = level
    for task, values in student.gates(images).items():
        for index, block in enumerate(student.levels):
            tokens[f"gates {names.get(task, task)} {block}"] = values[:, index]
    for task, logits in output.tasks.items():
        tokens[f"logits {names.get(task, task)}"] = logits
    return tokens


def lively(student: Student) -> Weights:
    """Reference-named weights that make every term count: a trained student's scales, not an
    untrained one's."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in student.state_dict().items():
        new = value.clone()
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and "pos_embed" not in name and "cls_token" not in name:
                new = noise / value[0].numel() ** 0.5
            else:
                new = value + 0.1 * noise
            if name.endswith("running_var"):
                new = 0.5 + noise.abs()
        weights[to_reference(name, stage_two=True)] = new
    return weights


def largest_differences(
    folder: Path,
    config: dict[str, object],
    size: tuple[int, int],
    tasks: tuple[Task, ...],
    teacher_width: int,
) -> dict[str, float]:
    """Per kind of tensor, the largest |difference| over the largest |value|."""
    torch.manual_seed(0)
    built = build_student(
        StudentConfig.model_validate(config), size, dict.fromkeys(TEACHERS, (teacher_width,) * 4), tasks
    )  # fmt: skip
    heads = built.vit.get_submodule("blocks.0.attn").num_heads
    weights = lively(built)
    del built
    torch.save({"model": weights}, folder / "checkpoint.pth")
    told = Unstated(image_size=size, heads=heads)  # type: ignore[arg-type]
    import_reference(folder / "checkpoint.pth", folder / "run", told)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = our_forward(load_student(folder / "run"), images)
        theirs = reference_forward(weights, images, heads)  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys()
    differences: dict[str, float] = {}
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        assert expected.std() > 1e-3, f"{name} is too plain to tell anything"
        error = ((ours[name] - expected).abs().max() / expected.abs().max()).item()
        kind = name.partition(" ")[0]
        differences[kind] = max(differences.get(kind, 0.0), error)
    if os.environ.get("SAK_PRINT_PARITY"):
        print(config["model"], size, {k: f"{v:.1e}" for k, v in differences.items()})
    return differences


NARROW = {"embed_dim": 64, "depth": 8, "num_heads": 2}
CASES = [
    ((384, 384), PASCAL_TASKS[:2]),
    ((512, 512), PASCAL_TASKS),
    ((448, 576), NYUD_TASKS),
]


@pytest.mark.parametrize(("size", "tasks"), CASES)
def test_a_narrow_student_equals_the_reference(
    tmp_path: Path, size: tuple[int, int], tasks: tuple[Task, ...]
) -> None:
    config = {"model": "vit_base_patch16_384", "model_args": NARROW}
    errors = largest_differences(tmp_path, config, size, tasks, teacher_width=96)
    assert max(errors.values()) < TOLERANCE, errors


def test_vit_small_equals_the_reference(tmp_path: Path) -> None:
    config = {"model": "vit_small_patch16_384"}
    errors = largest_differences(tmp_path, config, (448, 576), NYUD_TASKS[:2], teacher_width=768)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tasks"), CASES)
@pytest.mark.parametrize(
    ("model", "teacher_width"),
    [
        ("vit_small_patch16_384", 768),
        ("vit_base_patch16_384", 768),
        ("vit_base_patch16_384", 1024),
        ("vit_large_patch16_384", 1024),
    ],
)
def test_published_sizes_equal_the_reference(
    tmp_path: Path, model: str, teacher_width: int, size: tuple[int, int], tasks: tuple[Task, ...]
) -> None:
    errors = largest_differences(tmp_path, {"model": model}, size, tasks, teacher_width)
    assert max(errors.values()) < TOLERANCE, errors
    (tmp_path / "checkpoint.pth").unlink()  # 1.6 GB each
    (tmp_path / "run" / "student.safetensors").unlink()
