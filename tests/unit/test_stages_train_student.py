"""The student against its paper: sizes, and a literal re-computation of its formulas."""

import math

import pytest
import torch
from torch import Tensor

from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.train.config import StudentConfig
from stages.train.heads import level_widths
from stages.train.stem import StudentError, tapped_blocks
from stages.train.student import Student, StudentOutput, build_student

SIZE = (24, 32)
GRID = (3, 4)
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TASKS = (
    Task(name="segmentation", channels=5, loss_weight=1.0, metric="mIoU", lower_is_better=False),
    Task(name="depth", channels=1, loss_weight=1.0, metric="RMSE", lower_is_better=True),
)
TEACHERS = {"dino": (32, 32), "sam": (20, 32)}


def tiny(**settings: object) -> StudentConfig:
    values = {"model": "vit_tiny_patch16_224", "model_args": ARGS, "levels": (1, 3)}
    return StudentConfig.model_validate(values | settings)


def random_student(config: StudentConfig, *, teachers: object = None) -> Student:
    """A student whose every parameter and statistic is far from its starting value."""
    torch.manual_seed(0)
    chosen = TEACHERS if teachers is None else teachers
    student = build_student(config, SIZE, chosen, TASKS)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 0.4 - 0.15)
                if "running_var" in name or name.endswith("scale"):
                    value.add_(1)
    return student.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "width", "pascal", "nyud"),
    [("small", 384, 33.8, 32.0), ("base", 768, 133.5, 126.4), ("large", 1024, 406.7, 394.1)],
)
def test_parameter_counts_equal_the_published_ones(
    size: str, width: int, pascal: float, nyud: float
) -> None:
    config = StudentConfig(model=f"vit_{size}_patch16_384")
    teachers = dict.fromkeys(("dinov2", "clip", "sam"), (width,) * 4)
    with torch.device("meta"):
        students = [
            build_student(config, (512, 512), teachers, PASCAL_TASKS),
            build_student(config, (448, 576), teachers, NYUD_TASKS),
        ]
    for student, millions in zip(students, (pascal, nyud), strict=True):
        total = sum(parameter.numel() for parameter in student.parameters())
        assert total / 1e6 == pytest.approx(millions, abs=0.05)
        assert total == sum(student.parameter_counts().values())
        assert not student.ts_aligners


# ---- the formulas once more, one image, one token and one pixel at a time


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def block(weights: dict[str, Tensor], index: int, x: Tensor) -> Tensor:
    name = f"vit.blocks.{index}"
    query, key, value = linear(
        weights, f"{name}.attn.qkv", layer_norm(weights, f"{name}.norm1", x, 1e-6)
    ).chunk(3, dim=-1)
    heads = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        scores = (query[:, part] @ key[:, part].T / 4).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ value[:, part])
    x = x + linear(weights, f"{name}.attn.proj", torch.cat(heads, 1))
    hidden = linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.norm2", x, 1e-6))
    return x + linear(weights, f"{name}.mlp.fc2", gelu(hidden))


def embed(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    kernel = weights["vit.patch_embed.proj.weight"].flatten(1)
    tokens = [weights["vit.cls_token"][0, 0]]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
            tokens.append(kernel @ patch + weights["vit.patch_embed.proj.bias"])
    return torch.stack(tokens) + weights["vit.pos_embed"][0]


def adapter(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    update = linear(weights, f"{name}.up", gelu(linear(weights, f"{name}.down", x)))
    return x + weights[f"{name}.scale"] * update


def bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """C h w to C H W; the centres of the pixels, not the corners, are aligned."""
    out = torch.empty(grid.shape[0], *size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * grid.shape[1] / size[0] - 0.5, 0), grid.shape[1] - 1)
            x = min(max((column + 0.5) * grid.shape[2] / size[1] - 0.5, 0), grid.shape[2] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, grid.shape[1] - 1), min(left + 1, grid.shape[2] - 1)
            above = grid[:, top, left] * (left + 1 - x) + grid[:, top, right] * (x - left)
            below = grid[:, bottom, left] * (left + 1 - x) + grid[:, bottom, right] * (x - left)
            out[:, row, column] = above * (top + 1 - y) + below * (y - top)
    return out


def head(weights: dict[str, Tensor], name: str, levels: list[Tensor]) -> Tensor:
    quarter = (SIZE[0] // 4, SIZE[1] // 4)
    joined = torch.cat(
        [
            bilinear(linear(weights, f"{name}.linears.{k}", x).T.reshape(16, *GRID), quarter)
            for k, x in enumerate(levels)
        ]
    )
    padded = torch.zeros(32, quarter[0] + 2, quarter[1] + 2)
    padded[:, 1:-1, 1:-1] = joined
    kernel, bias = weights[f"{name}.linear_fuse.0.weight"], weights[f"{name}.linear_fuse.0.bias"]
    logits = torch.empty(weights[f"{name}.last_conv.bias"].shape[0], *quarter)
    norm = {k: weights[f"{name}.linear_fuse.1.{k}"] for k in ("weight", "bias")}
    mean = weights[f"{name}.linear_fuse.1.running_mean"]
    variance = weights[f"{name}.linear_fuse.1.running_var"]
    for row in range(quarter[0]):
        for column in range(quarter[1]):
            window = padded[:, row : row + 3, column : column + 3]
            value = (kernel * window).sum((1, 2, 3)) + bias
            value = gelu((value - mean) / (variance + 1e-5).sqrt() * norm["weight"] + norm["bias"])
            last = weights[f"{name}.last_conv.weight"][:, :, 0, 0]
            logits[:, row, column] = last @ value + weights[f"{name}.last_conv.bias"]
    return bilinear(logits, SIZE)


def literal_forward(weights: dict[str, Tensor], image: Tensor, *, routed: bool) -> StudentOutput:
    stem = [embed(weights, image)]
    for index in range(4):
        stem.append(block(weights, index, stem[-1]))
    experts: dict[int, list[Tensor]] = {level: [stem[level + 1][1:]] for level in (1, 3)}
    paths: dict[str, list[Tensor]] = {name: [] for name in TEACHERS}
    for teacher in TEACHERS:
        state = adapter(weights, f"tsap.{teacher}.0", stem[0])
        for index in range(4):
            state = adapter(weights, f"tsap.{teacher}.{index + 1}", state + stem[index + 1])
            if index in experts:
                out = layer_norm(weights, f"out_norms.{index}_{teacher}", state[1:], 1e-5)
                experts[index].append(out)
                name = f"ts_aligners.{index}_{teacher}"
                aligned = linear(weights, name, out) if f"{name}.weight" in weights else out
                paths[teacher].append(aligned.reshape(*GRID, -1))
    tasks = {}
    for task in ("segmentation", "depth"):
        mixed = []
        for index, choices in experts.items():
            gates = torch.ones(3)
            if routed:
                name = f"mor.{index}_{task}.router.module"
                hidden = linear(weights, f"{name}.0", choices[0])
                hidden = gelu(layer_norm(weights, f"{name}.1", hidden, 1e-5))
                scores = linear(weights, f"{name}.3", hidden).mean(0)[:3].exp()
                gates = scores / scores.sum()
            mixed.append(sum(g * x for g, x in zip(gates, choices, strict=True)))
        tasks[task] = head(weights, f"heads.{task}", mixed)
    return StudentOutput(paths=paths, tasks=tasks)


@pytest.mark.parametrize("router", ["sak", "sum"])
def test_forward_equals_the_formulas(router: str) -> None:
    student = random_student(tiny(router=router))
    batch = images()
    with torch.no_grad():
        output = student(batch)
        for index, image in enumerate(batch):
            expected = literal_forward(student.state_dict(), image, routed=router == "sak")
            for teacher, levels in expected.paths.items():
                for mine, theirs in zip(output.paths[teacher], levels, strict=True):
                    torch.testing.assert_close(mine[index], theirs, rtol=1e-5, atol=1e-5)
            for task, logits in expected.tasks.items():
                torch.testing.assert_close(output.tasks[task][index], logits, rtol=1e-5, atol=1e-5)


def test_aligners_only_where_widths_differ() -> None:
    student = random_student(tiny())
    assert list(student.ts_aligners) == ["1_sam"]
    shapes = [level.shape for level in student(images()).paths["sam"]]
    assert shapes == [(2, *GRID, 20), (2, *GRID, 32)]
    assert student(images(), distillation=False).paths == {}
    bare = build_student(tiny(), SIZE, TEACHERS, TASKS, aligners=False)
    assert not bare.ts_aligners


def test_gates_are_distributions_over_stem_and_teachers() -> None:
    gates = random_student(tiny()).gates(images())
    assert list(gates) == ["segmentation", "depth"]
    for value in gates.values():
        assert value.shape == (2, 2, 3)
        torch.testing.assert_close(value.sum(-1), torch.ones(2, 2))
    assert random_student(tiny(router="sum")).gates(images()) == {}


def test_training_noise_differs_from_pixel_to_pixel_and_follows_the_global_seed() -> None:
    student = random_student(tiny()).train()
    router = student.get_submodule("mor.1_depth")
    tokens = torch.randn(2, 12, 32)
    torch.manual_seed(3)
    gates = router(tokens)
    torch.manual_seed(3)
    noise = torch.randn(2, 12, 3)
    scores = router.get_submodule("router")(tokens)
    clean, raw = scores[:, None, :3], scores[:, None, 3:]
    expected = (clean + noise * (torch.log1p(raw.exp()) + 0.01)).softmax(-1)
    torch.testing.assert_close(gates, expected)
    assert not torch.allclose(gates[:, 0], gates[:, 1])


def test_nothing_is_built_or_computed_that_is_not_asked_for() -> None:
    plain = build_student(tiny(), SIZE, {}, TASKS)
    counts = plain.parameter_counts()
    assert [counts[part] for part in ("paths", "norms", "aligners", "routers")] == [0] * 4
    assert plain(images()).paths == {}
    unlabelled = build_student(tiny(), SIZE, TEACHERS, ())
    counts = unlabelled.parameter_counts()
    assert [counts[part] for part in ("routers", "heads")] == [0] * 2
    assert unlabelled(images()).tasks == {}


def test_blocks_after_the_last_level_are_cut_off() -> None:
    student = build_student(tiny(levels=(0, 2)), SIZE, {"dino": (32, 32)}, ())
    assert len(student.vit.blocks) == 3
    assert len(student.get_submodule("tsap.dino")) == 4  # type: ignore[arg-type]


def test_prefix_tokens_of_any_number_are_carried() -> None:
    config = tiny(model_args={**ARGS, "reg_tokens": 3, "pre_norm": True})
    student = build_student(config, SIZE, TEACHERS, TASKS).eval()
    output = student(images())
    assert output.paths["dino"][0].shape == (2, *GRID, 32)
    without = build_student(
        tiny(model_args={**ARGS, "class_token": False, "global_pool": "avg"}), SIZE, {}, TASKS
    )
    assert without(images()).tasks["depth"].shape == (2, 1, *SIZE)


def test_other_image_sizes_run_and_bad_ones_are_refused() -> None:
    student = random_student(tiny())
    assert student(torch.zeros(1, 3, 40, 16)).tasks["depth"].shape == (1, 1, 40, 16)
    with pytest.raises(StudentError, match=r"not a multiple .* \(24, 32\)"):
        student(torch.zeros(1, 3, 25, 32))


@pytest.mark.parametrize(
    ("config", "teachers", "message"),
    [
        (tiny(model="vit_tinny_patch16_224"), {}, "nearest: vit_tiny"),
        (tiny(model="resnet18", model_args={}), {}, "VisionTransformer family"),
        (tiny(model_args={"widht": 3}), {}, "widht"),
        (tiny(levels=5), {}, "5 levels of a student with 4 blocks"),
        (tiny(levels=(1, 4)), {}, "block 4, but the student has 4 blocks"),
        (tiny(), {"dino": (32,)}, "has 1 levels, the student has 2"),
        (tiny(), {"a.b": (32, 32)}, "cannot be used"),
        (tiny(), {"keys": (32, 32)}, "cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: StudentConfig, teachers: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        build_student(config, SIZE, teachers, TASKS)


def test_levels_are_spread_evenly_and_end_with_the_last_block() -> None:
    assert tapped_blocks(4, 12) == (2, 5, 8, 11)
    assert tapped_blocks(4, 24) == (5, 11, 17, 23)
    assert tapped_blocks(3, 8) == (1, 4, 7)
    assert tapped_blocks((0, 7), 8) == (0, 7)
    assert level_widths(96, 4) == (24, 24, 24, 24)
    assert level_widths(32, 3) == (11, 11, 10)
