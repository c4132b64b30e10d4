"""Targets decoded on the device are those of the store, and sampled ones are unbiased."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.train.losses import distillation_losses
from stages.train.sampling import Draw, ask_teachers
from stages.train.stream import Batch
from stages.train.targets import CachedTargets, TeacherTargets, sampling_weights
from store.reader import FeatureStore
from store.spec import Grid
from store.testing import sample_images, sample_teacher, write_store

CPU = torch.device("cpu")
IDS = tuple(f"room/{number}" for number in range(5))
TEACHERS = ("a", "b", "c")


def batch_of(
    targets: dict[str, list[Tensor]], rows: dict[str, Tensor | None], ids: Sequence[str] = IDS
) -> Batch:
    return Batch(
        ids=tuple(ids),
        views=(0,) * len(ids),
        images=torch.zeros(len(ids), 3, 2, 2),
        labels={},
        targets=targets,
        target_rows=rows,
    )


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int8-pca4", "pca-4bit"])
def test_codes_become_what_the_store_reads(codec: str, tmp_path: Path) -> None:
    spec = sample_teacher(codec=codec, pyramid=True)
    write_store(tmp_path / "store", sample_images(6), spec)
    store = FeatureStore(tmp_path / "store")
    levels: list[tuple[str, Grid]] = [("stage_1", (2, 2)), ("stage_2", (2, 2))]
    for rows, places in (([4, 0, 1], None), ([4, 1], torch.tensor([0, 2])), ([], torch.empty(0))):
        wanted = None if places is None else places.long()
        codes = [store.read_codes("small", name, rows, grid) for name, grid in levels]
        batch = batch_of(
            {"small": [torch.from_numpy(one) for one in codes]},
            {"small": wanted, "another": None},
            IDS[:3],
        )
        got = CachedTargets(store, {"small": levels}, CPU)(batch)["small"]
        assert got.rows is wanted
        assert [level.shape[0] for level in got.levels] == [len(rows)] * 2
        for level, (name, grid) in zip(got.levels, levels, strict=True):
            assert level.dtype == torch.float32
            if rows:
                expected = store.read("small", name, rows, grid)
                np.testing.assert_allclose(level, expected, rtol=1e-5, atol=1e-5)


def sampled(
    epoch: int, count: int, answers: dict[str, list[Tensor]], ids: Sequence[str] = IDS
) -> dict[str, TeacherTargets]:
    """What the stream and the source of targets make of the full answers."""
    draws = [Draw(epoch=epoch, index=place) for place in range(len(ids))]
    asked = ask_teachers(3, draws, ids, TEACHERS, count)
    rows = {name: None if one is None else torch.tensor(one).long() for name, one in asked.items()}
    codes = {
        name: [level if rows[name] is None else level[rows[name]] for level in levels]
        for name, levels in answers.items()
    }
    weights = sampling_weights(batch_of(codes, rows, ids))
    return {
        name: TeacherTargets(levels=codes[name], rows=rows[name], weight=weights[name])
        for name in TEACHERS
    }


@pytest.fixture
def answers() -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    return {
        name: [torch.randn(len(IDS), 2, 3, 4), torch.randn(len(IDS), 2, 2, 5)] for name in TEACHERS
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_expectation_over_all_draws_is_the_full_loss(
    count: int, answers: dict[str, list[Tensor]]
) -> None:
    """In as many epochs as teachers every image asks each equally often: the mean is exact."""
    paths = {name: [torch.randn_like(level) for level in answers[name]] for name in TEACHERS}
    full = distillation_losses(
        paths, {name: TeacherTargets(levels=levels) for name, levels in answers.items()}
    )
    draws = [
        distillation_losses(paths, sampled(epoch, count, answers)) for epoch in range(len(TEACHERS))
    ]
    for name in TEACHERS:
        found = torch.stack([losses[name] for losses in draws])
        torch.testing.assert_close(found.mean(0), full[name])
        assert (count == 3) == bool(torch.allclose(found, full[name]))


def test_a_teacher_that_nobody_asks_gives_zero_with_every_gradient(
    answers: dict[str, list[Tensor]],
) -> None:
    one = {name: [level[:1] for level in levels] for name, levels in answers.items()}
    targets = sampled(0, 1, one, IDS[:1])
    assert Counter(len(target.levels[0]) for target in targets.values()) == {0: 2, 1: 1}
    paths = {
        name: [torch.randn_like(level).requires_grad_() for level in levels]
        for name, levels in one.items()
    }
    losses = distillation_losses(paths, targets)
    torch.autograd.backward(torch.stack([loss.sum() for loss in losses.values()]).sum())
    for name, target in targets.items():
        nobody = target.rows is not None and not len(target.rows)
        assert bool(losses[name].eq(0).all()) == nobody
        assert target.weight == (0 if nobody else 3)
        for path in paths[name]:
            assert path.grad is not None
            assert bool(path.grad.eq(0).all()) == nobody


def test_the_loss_of_sampled_teachers_teaches_only_the_images_that_ask(
    answers: dict[str, list[Tensor]],
) -> None:
    targets = sampled(1, 2, answers)
    paths = {
        name: [torch.randn_like(level).requires_grad_() for level in levels]
        for name, levels in answers.items()
    }
    losses = distillation_losses(paths, targets)
    torch.autograd.backward(torch.stack([loss.sum() for loss in losses.values()]).sum())
    for name, target in targets.items():
        for path in paths[name]:
            assert path.grad is not None
            assert target.rows is not None
            learning = path.grad.flatten(1).ne(0).any(dim=1).nonzero().flatten()
            assert learning.equal(target.rows)
