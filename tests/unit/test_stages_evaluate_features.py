"""Classes, fidelity and rank on features whose answers are known; a student as a source."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from stages.evaluate.classes import class_probe, linear_classes, neighbour_classes
from stages.evaluate.features import Key, StoreFeatures
from stages.evaluate.fidelity import LinearAlignment, fidelity, rank_me, ranks
from stages.evaluate.splits import SplitError, class_splits
from stages.progress import NoProgress
from store.images import ImageTable
from store.reader import FeatureStore
from store.testing import sample_teacher, write_store

CPU = torch.device("cpu")


class Given:
    """A source of tensors that are given."""

    def __init__(self, levels: dict[Key, dict[str, torch.Tensor]]) -> None:
        self._levels = levels
        first = {key: next(iter(images.values())) for key, images in levels.items()}
        self.grids = {key: (level.shape[0], level.shape[1]) for key, level in first.items()}
        self.channels = {key: level.shape[2] for key, level in first.items()}

    def moments(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.channels[key]
        return torch.zeros(width), torch.ones(width)

    def read(self, ids: list[str]) -> dict[Key, torch.Tensor]:
        return {
            key: torch.stack([images[one] for one in ids]) for key, images in self._levels.items()
        }

    def pooled(self, ids: list[str]) -> dict[Key, torch.Tensor]:
        return {key: level.mean(dim=(1, 2)) for key, level in self.read(ids).items()}


def maps(names: list[str], shape: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name in names}


class TestClassSplits:
    def test_folders_named_train_and_val(self) -> None:
        found = class_splits(["train/cat/1", "train/dog/1", "val/dog/2", "val/cat/x/3"])
        assert found.train == ("train/cat/1", "train/dog/1")
        assert found.val == ("val/dog/2", "val/cat/x/3")
        assert found.classes == ("cat", "dog")
        assert found.labels["val/cat/x/3"] == 0

    def test_drawn_by_id_alone(self) -> None:
        ids = [f"{'cat' if number % 2 else 'dog'}/{number}" for number in range(1000)]
        found = class_splits(ids)
        assert 150 < len(found.val) < 250
        backwards = class_splits(ids[::-1])
        assert set(backwards.val) == set(found.val)
        assert set(found.train) | set(found.val) == set(ids)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (["cat/1", "loose"], "1 images lie in no class folder, the first being 'loose'"),
            ([f"cat/{number}" for number in range(30)], "1 classes"),
            (["train/cat/1", "train/dog/1"], "0 to measure on"),
        ],
    )
    def test_refused(self, ids: list[str], message: str) -> None:
        with pytest.raises(SplitError, match=message):
            class_splits(ids)


class TestClasses:
    def test_neighbours_vote_by_cosine_not_by_length(self) -> None:
        train = np.array([[1, 0], [2, 0.1], [0, 5], [0.1, 9]], np.float32)
        classes = np.array([0, 0, 1, 1])
        val = np.array([[100, 1], [0.01, 0.1]], np.float32)
        assert neighbour_classes(train, classes, val).tolist() == [0, 1]

    def test_near_neighbours_outvote_a_far_majority(self) -> None:
        train = np.array([[1, 0]] + [[0, 1]] * 5, np.float32)
        val = np.array([[1, 0.1]], np.float32)
        assert neighbour_classes(train, np.array([0] + [1] * 5), val).tolist() == [0]

    def test_linear_separates_what_neighbours_cannot(self) -> None:
        generator = np.random.default_rng(0)
        vectors = generator.normal(size=(400, 30)).astype(np.float32)
        vectors[:, 0] *= 0.01  # small, but all that counts
        answers = (vectors[:, 0] > 0).astype(int)
        found = linear_classes(vectors[:300], answers[:300], vectors[300:])
        assert (found == answers[300:]).mean() > 0.9
        assert (neighbour_classes(vectors[:300], answers[:300], vectors[300:]) ==
                answers[300:]).mean() < 0.7  # fmt: skip

    def test_scores_per_level(self) -> None:
        ids = [f"{'cat' if number % 2 else 'dog'}/{number}" for number in range(60)]
        knowing = {one: torch.full((2, 3, 4), 1.0 if "cat" in one else -1.0) for one in ids}
        source = Given({("t", "knows"): knowing, ("t", "blind"): maps(ids, (2, 3, 4))})
        scores = class_probe(source, class_splits(ids), batch_size=7, progress=NoProgress())
        found = {score.level: score for score in scores}
        assert found["knows"].neighbours == found["knows"].linear == 100
        assert found["blind"].neighbours < 90
        assert found["blind"].linear < 90


class TestFidelity:
    def test_alignment_is_blind_to_turns_scale_and_shift(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(500, 4, generator=generator)
        turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
        cases = {"same": x, "turned": 3 * x @ turn + 7, "other": torch.randn(500, 4)}
        found = {}
        for name, y in cases.items():
            alignment = LinearAlignment(4, 4, CPU)
            for start in range(0, 500, 130):
                alignment.add(x[start : start + 130], y[start : start + 130])
            found[name] = alignment.compute()
        assert found["same"] == pytest.approx(1)
        assert found["turned"] == pytest.approx(1)
        assert found["other"] < 0.1

    def test_alignment_equals_the_definition_by_centred_kernels(self) -> None:
        generator = np.random.default_rng(0)
        x, y = generator.normal(2, 1, (40, 3)), generator.normal(size=(40, 5))
        y[:, :2] += x[:, :2]
        centre = np.eye(40) - 1 / 40
        k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        expected = (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())
        alignment = LinearAlignment(3, 5, CPU)
        alignment.add(torch.tensor(x).float(), torch.tensor(y).float())
        assert alignment.compute() == pytest.approx(expected, rel=1e-4)

    def test_a_constant_side_has_no_alignment(self) -> None:
        alignment = LinearAlignment(2, 2, CPU)
        alignment.add(torch.ones(9, 2), torch.randn(9, 2))
        assert math.isnan(alignment.compute())

    def test_cosine_per_token_and_grids_meet(self) -> None:
        ids = ["a", "b"]
        teacher = maps(ids, (4, 4, 3))
        half = {name: level.clone() for name, level in teacher.items()}
        half["b"][:2] *= -1  # a quarter of all tokens point the other way
        coarse = {name: torch.ones(2, 2, 3) for name in ids}
        scores = fidelity(
            Given({("p", "x"): half, ("p", "y"): coarse}),
            Given({("t", "x"): teacher, ("t", "y"): {name: torch.ones(4, 4, 3) for name in ids}}),
            {("p", "x"): ("t", "x"), ("p", "y"): ("t", "y")},
            ids,
            batch_size=1,
            progress=NoProgress(),
        )
        assert scores[0].cosine_mean == pytest.approx(0.5)
        assert scores[0].cosine_p01 == pytest.approx(-1)
        assert scores[1].cosine_mean == pytest.approx(1)

    def test_other_width_has_alignment_alone(self) -> None:
        ids = ["a"]
        level = maps(ids, (4, 4, 3))
        wide = {"a": torch.cat([level["a"], level["a"]], dim=-1)}
        key = ("t", "x")
        scores = fidelity(
            Given({key: level}), Given({key: wide}), {key: key}, ids, batch_size=1,
            progress=NoProgress(),
        )  # fmt: skip
        assert math.isnan(scores[0].cosine_mean)
        assert scores[0].cka == pytest.approx(1, abs=1e-4)


class TestRank:
    @pytest.mark.parametrize("directions", [1, 3, 8])
    def test_equal_directions_count_themselves(self, directions: int) -> None:
        tokens = torch.eye(8)[:directions].repeat(50, 1)
        assert rank_me(tokens.T @ tokens) == pytest.approx(directions, rel=1e-3)

    def test_equals_singular_values_of_the_features(self) -> None:
        ids = ["a", "b", "c"]
        given = maps(ids, (3, 5, 6))
        tokens = torch.cat([level.flatten(0, 1) for level in given.values()]).double()
        shares = torch.linalg.svdvals(tokens)
        shares = shares / shares.sum()
        found = ranks(Given({("t", "x"): given}), ids, batch_size=2, progress=NoProgress())
        assert found[0].rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
        assert found[0].channels == 6


def test_a_store_pools_tokens_and_adds_the_global_vector(tmp_path: Path) -> None:
    count = 5
    images = ImageTable(
        ids=tuple("abcde"), sha256=("1" * 64,) * count, heights=(24,) * count,
        widths=(32,) * count, statuses=("ok",) * count,
    )  # fmt: skip
    write_store(tmp_path / "s", images, sample_teacher(global_channels=5))
    store = FeatureStore(tmp_path / "s")
    vectors = StoreFeatures(store, CPU).pooled(["d", "b"])
    assert set(vectors) == {("small", "stage_1"), ("small", "stage_2"), ("small", "global")}
    expected = store.read("small", "stage_1", [3, 1]).astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose(vectors["small", "stage_1"].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        vectors["small", "global"].numpy(), store.read("small", "global", [3, 1])
    )


def sak(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_commands(tiny_params: Path, tmp_path: Path) -> None:
    """Every probe of a distilled student, and of the store it learned from."""
    sak("index", "--params", tiny_params)
    sak("extract-teachers", "--params", tiny_params)
    sak("train-student", "distill", "--params", tiny_params)
    runs = Path(yaml.safe_load(tiny_params.read_text())["runs"])
    of_student = ("--student", runs / "distill", "--params", tiny_params)
    dense = sak("probe", "dense", *of_student)
    assert set(dense["scores"]) == {"stem", "first", "second"}  # type: ignore[call-overload]
    kept = sak("probe", "fidelity", *of_student)["scores"]
    assert {line["teacher"] for line in kept} == {"first", "second"}  # type: ignore[union-attr, index]
    assert all(-1 <= line["cosine_mean"] <= 1 for line in kept)  # type: ignore[union-attr, index]
    wide = sak("probe", "rank", *of_student)["scores"]
    assert all(1 <= line["rank"] <= line["channels"] for line in wide)  # type: ignore[union-attr, index]
    assert len(sak("probe", "rank", "--params", tiny_params)["scores"]) == 8  # type: ignore[arg-type]
    refused = CliRunner().invoke(app, ["probe", "classes", "--params", str(tiny_params)])
    assert refused.exit_code == 2
    assert "lie in no class folder" in refused.output


def test_classes_by_folder(tiny_params: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_params.read_text())
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(15):
            pixels = generator.integers(0, 60, (32, 48, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    values |= {"data": {"kind": "folder", "root": str(tmp_path / "photos")}, "tasks": []}
    tiny_params.write_text(yaml.safe_dump(values))
    sak("index", "--params", tiny_params)
    sak("extract-teachers", "first", "--params", tiny_params)
    scores = sak("probe", "classes", "--params", tiny_params)["scores"]
    assert [line["level"] for line in scores][-1] == "global"  # type: ignore[attr-defined, index]
    assert all(line["linear"] == 100 for line in scores)  # type: ignore[attr-defined, index]
