"""Published checkpoints: every weight comes in and goes out again, bit for bit, or is refused."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pipeline.testing import sak, sak_json
from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.train.config import StudentConfig
from stages.train.reference import export_reference, import_reference
from stages.train.reference_file import ReferenceError
from stages.train.reference_infer import Unstated
from stages.train.reference_names import to_reference
from stages.train.saving import StudentDescription, initialise_from, load_student, save_student
from stages.train.stem import StudentError
from stages.train.student import build_student

ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 1}
TEACHERS = {"sam": (96, 96), "clip": (96, 96), "dinov2": (96, 96)}


def published(
    *,
    teachers: dict[str, tuple[int, ...]],
    tasks: Sequence[Task],
    size: tuple[int, int] = (32, 32),
    args: dict[str, int] = ARGS,
    seed: int = 0,
    **student: object,
) -> dict[str, Tensor]:
    """Random weights under the reference's names, in its order."""
    values = {"model": "vit_base_patch16_384", "model_args": args, "levels": (1, 3), **student}
    built = build_student(StudentConfig.model_validate(values), size, teachers, tasks)
    generator = torch.Generator().manual_seed(seed)
    return {
        to_reference(name, bool(tasks)): torch.randn(value.shape, generator=generator).abs() / 9
        if value.is_floating_point()
        else torch.tensor(seed)
        for name, value in built.state_dict().items()
    }


def written(path: Path, weights: dict[str, Any], **others: object) -> Path:
    torch.save({"model": weights, **others}, path)
    return path


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    depth=st.integers(2, 4),
    heads=st.sampled_from([1, 2]),
    patch=st.sampled_from([8, 16]),
    grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    names=st.permutations(["dinov2", "clip", "sam", "radio_b"]),
    teachers=st.integers(1, 4),
    aligned=st.booleans(),
    ratio=st.sampled_from([2, 4, 8]),
    tasks=st.sampled_from([(), NYUD_TASKS, PASCAL_TASKS, PASCAL_TASKS[::-1], NYUD_TASKS[1:2]]),
    router=st.sampled_from(["sak", "sak-noiseless", "sum"]),
)
def test_a_checkpoint_goes_in_and_out_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    depth: int,
    heads: int,
    patch: int,
    grid: tuple[int, int],
    names: list[str],
    teachers: int,
    aligned: bool,
    ratio: int,
    tasks: tuple[Task, ...],
    router: str,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    size = (grid[0] * patch, grid[1] * patch)
    channels = (96 if aligned else 64 * heads,) * 2
    args = {"patch_size": patch, "embed_dim": 64 * heads, "depth": depth, "num_heads": heads}
    weights = published(
        teachers=dict.fromkeys(names[:teachers], channels), tasks=tasks, size=size, args=args,
        levels=(depth - 2, depth - 1), adapter_ratio=ratio, router=router,
    )  # fmt: skip
    told = Unstated(image_size=size)
    result = import_reference(written(folder / "in.pth", weights), folder / "run", told)
    assert (result.stage, result.used) == (2 if tasks else 1, len(weights))
    assert list(result.teachers) == names[:teachers]
    assert result.levels == (depth - 2, depth - 1)
    assert result.tasks == {task.name: task.channels for task in tasks}
    assert result.router == (router if tasks else "none")
    assert result.aligners == aligned
    export_reference(folder / "run", folder / "out.pth")
    again = torch.load(folder / "out.pth", weights_only=True)
    assert list(again) == ["model"]
    assert list(again["model"]) == list(weights)
    assert all(torch.equal(again["model"][name], value) for name, value in weights.items())


def test_published_sizes_and_grids_are_inferred(tmp_path: Path) -> None:
    config = StudentConfig(model="vit_small_patch16_384")
    student = build_student(config, (384, 384), {"sam": (768,) * 4}, ())
    result = import_reference(written(tmp_path / "s.pth", student.state_dict()), tmp_path / "run")
    assert result.stem == "vit_small_patch16_384"
    assert result.image_size == (384, 384)
    assert result.levels == (2, 5, 8, 11)
    assert result.aligners
    assert load_student(tmp_path / "run").mean == (0.485, 0.456, 0.406)


def test_what_the_file_holds_beside_the_model_is_told(tmp_path: Path) -> None:
    weights = published(teachers=TEACHERS, tasks=())
    file = written(tmp_path / "c.pth", weights, optimizer={"state": {}}, epoch=29)
    assert sak_json("import-checkpoint", file, tmp_path / "run")["left_out"] == [
        "optimizer",
        "epoch",
    ]
    message = sak("import-checkpoint", file, tmp_path / "run", code=2)
    assert "holds a student already" in message
    exported = sak_json("export", "--format", "reference", tmp_path / "run", tmp_path / "o.pth")
    assert exported["weights"] == len(weights)
    assert "o.pth exists" in sak("export", tmp_path / "run", tmp_path / "o.pth", code=2)
    assert "HEIGHTxWIDTH" in sak(
        "import-checkpoint", file, tmp_path / "x", "--image-size", "a", code=2
    )


def test_a_plain_state_dict_and_safetensors(tmp_path: Path) -> None:
    weights = published(teachers=TEACHERS, tasks=NYUD_TASKS)
    torch.save(weights, tmp_path / "plain.pth")
    save_file(weights, tmp_path / "c.safetensors")
    import_reference(tmp_path / "plain.pth", tmp_path / "plain")
    with pytest.raises(ReferenceError, match="keeps no order"):
        import_reference(tmp_path / "c.safetensors", tmp_path / "safe")
    options = [part for name in TEACHERS for part in ("--teacher", name)]
    sak("import-checkpoint", tmp_path / "c.safetensors", tmp_path / "safe", *options)
    plain, safe = load_student(tmp_path / "plain"), load_student(tmp_path / "safe")
    assert plain.teachers == safe.teachers == tuple(TEACHERS)
    images = torch.randn(1, 3, 32, 32)
    for task, logits in plain(images).tasks.items():
        torch.testing.assert_close(safe(images).tasks[task], logits)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    weights: dict[str, Any] = published(teachers=TEACHERS, tasks=NYUD_TASKS)
    change(weights)
    return weights


NORM = "backbone.out_norms.1_sam.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), rf"1 missing:\s+{NORM}"),
        (lambda w: w.update({"backbone.tsap.sam.9.scale": torch.ones(1)}), "of no part"),
        (lambda w: w.update({"optimizer.lr": torch.ones(1)}), "in no SAK checkpoint"),
        (lambda w: w.update({"backbone.vit.norm.weight": torch.ones(64)}), "of no part"),
        (lambda w: w.update({"vit.cls_token": torch.ones(1, 1, 64)}), "prefixes are mixed"),
        (lambda w: w.update({NORM: torch.ones(63)}), r"\(63,\), expected \(64,\)"),
        (lambda w: w.update({"heads.faces.last_conv.bias": torch.ones(1)}), "unknown task"),
        (lambda w: w.update({NORM: torch.full((64,), float("nan"))}), "NaN or infinity"),
        (lambda w: w.update({NORM: torch.ones(64).half()}), r"float16, expected torch\.float32"),
        (lambda w: w.update({NORM: torch.ones(1).expand(10**15)}), "claims more"),
        (lambda w: w.update({NORM: torch.ones(64).to_sparse()}), "not a dense tensor"),
        (lambda w: w.update({NORM: [1.0]}), "expected a tensor"),
        (lambda w: w.update({"backbone.vit.pos_embed": torch.ones(64)}), "absent or misshapen"),
        (lambda w: w.update({"backbone.vit.pos_embed": torch.ones(1, 8, 64)}), "no square grid"),
        (lambda w: w.clear(), "holds no weights"),
    ],
)  # fmt: skip
def test_what_is_no_published_student_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    file = written(tmp_path / "c.pth", changed(change))
    with pytest.raises(ReferenceError, match=message):
        import_reference(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


def test_hostile_files_are_refused_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(tmp_path / "whole.pth", published(teachers=TEACHERS, tasks=())).read_bytes()
    middle = len(whole) // 2
    files = {
        "cut": whole[:-middle],
        "short": whole[:40],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "text": b"no checkpoint at all",
        "pickle": pickle.dumps(Code()),
        "legacy": pickle.dumps({"a": 1}),
    }
    torch.save({"model": Code()}, tmp_path / "code")
    files["code"] = (tmp_path / "code").read_bytes()
    for name, content in files.items():
        for suffix in ("pth", "safetensors"):
            file = tmp_path / f"{name}.{suffix}"
            file.write_bytes(content)
            message = sak("import-checkpoint", file, tmp_path / "run", code=2)
            assert name in message, message
    assert "must never run" not in capsys.readouterr().out
    assert "holds objects or code" in sak("import-checkpoint", tmp_path / "code.pth", "x", code=2)
    assert "no file at" in sak("import-checkpoint", tmp_path / "absent.pth", "x", code=2)


def test_a_student_that_the_reference_cannot_have_is_not_exported(tmp_path: Path) -> None:
    config = StudentConfig(model="vit_base_patch16_384", model_args={**ARGS, "reg_tokens": 2})
    for name, teachers in (("registers", TEACHERS), ("bare", {})):
        description = StudentDescription(
            student=config.model_copy(update={"levels": (1, 3)}), image_size=(32, 32),
            teachers=teachers, tasks=NYUD_TASKS, aligners=True,
        )  # fmt: skip
        save_student(tmp_path / name, description.build(), description, {})
        with pytest.raises(ReferenceError, match="the reference has no student as in"):
            export_reference(tmp_path / name, tmp_path / "o.pth")


def test_stage_two_starts_from_an_imported_checkpoint(tmp_path: Path) -> None:
    weights = published(teachers=TEACHERS, tasks=())
    import_reference(written(tmp_path / "c.pth", weights), tmp_path / "run")
    values = {"model": "vit_base_patch16_384", "model_args": ARGS, "levels": (1, 3)}
    told = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    student = build_student(
        StudentConfig.model_validate(values | told), (32, 48), TEACHERS, NYUD_TASKS
    )
    assert initialise_from(student, tmp_path / "run") == ("routers", "heads")
    grid = weights["vit.pos_embed"][:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(4, 6), mode="bicubic")
    expected = resized.permute(0, 2, 3, 1).reshape(1, 24, 64)
    torch.testing.assert_close(student.vit.pos_embed[:, 1:], expected)
    assert torch.equal(student.vit.pos_embed[:, :1], weights["vit.pos_embed"][:, :1])
    other = build_student(StudentConfig.model_validate(values), (32, 32), TEACHERS, NYUD_TASKS)
    with pytest.raises(StudentError, match=r"student\.mean and student\.std"):
        initialise_from(other, tmp_path / "run")
