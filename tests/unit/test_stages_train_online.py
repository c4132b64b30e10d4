"""Teachers that run live give what the store would have: same inputs, same levels, same training."""

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages.data.config import FolderData, PhotometricConfig, ViewsConfig
from stages.data.dataset import Dataset, open_dataset
from stages.data.images import index_images
from stages.data.views import draw_views
from stages.extract.config import TeacherConfig
from stages.extract.run import extract_teacher
from stages.extract.teachers import NetworkTeacher, load_teacher
from stages.progress import NoProgress
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig
from stages.train.online import OnlineTargets
from stages.train.run import TrainingError, TrainingRun, train
from stages.train.sampling import Draw
from stages.train.stream import StreamSpec, TargetStream
from store.reader import FeatureStore
from store.writer import create_store

SIZE = (32, 48)
IMAGES = 6
VIEWS = ViewsConfig(count=3, photometric=PhotometricConfig(brightness=0.2))
ARGS = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
PHASE = PhaseConfig(steps=5, batch_size=2, learning_rate=1e-2, log_every=1)
SMALL = PHASE.model_copy(update={"resolution": (1, 2)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 41 + number)).save(folder / f"{number}.png")
    return open_dataset(FolderData(kind="folder", root=folder))


@pytest.fixture(scope="module")
def teachers() -> dict[str, NetworkTeacher]:
    """Of the view's size and mean, and of another: what stage one does is told apart."""
    configs = {
        "vit": TeacherConfig(
            source="timm:test_vit", checkpoint="random", levels=2, codec="float32",
            resolutions=("native", (1, 2)),
        ),
        "resnet": TeacherConfig(
            source="timm:test_resnet", checkpoint="random", levels=2, codec="float32",
            resolutions=("native", (1, 2)), input_size=(64, 64), mean=(0.1, 0.2, 0.3),
        ),
    }  # fmt: skip
    device = torch.device("cpu")
    return {name: load_teacher(name, config, SIZE, device) for name, config in configs.items()}


def empty_store(path: Path, dataset: Dataset, views: ViewsConfig) -> FeatureStore:
    images = index_images(dataset.images, max_bad=0.0, progress=NoProgress())
    create_store(path, images, draw_views(images, SIZE, views))
    return FeatureStore(path)


def filled_store(
    path: Path, dataset: Dataset, views: ViewsConfig, teachers: Mapping[str, NetworkTeacher]
) -> FeatureStore:
    empty_store(path, dataset, views)
    for teacher in teachers.values():
        extract_teacher(path, dataset.images, SIZE, teacher, 4, 2**20, NoProgress())
    return FeatureStore(path)


def make_run(folder: Path, phase: PhaseConfig) -> TrainingRun:
    return TrainingRun(
        folder=folder,
        image_size=SIZE,
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=ARGS, levels=2),
        teachers=("vit", "resnet"),
        tasks=(),
        phase=phase,
        runtime=RuntimeConfig(device="cpu", seed=3),
    )


@pytest.mark.parametrize(
    ("phase", "views"), [(PHASE, ViewsConfig()), (SMALL, VIEWS)], ids=["view 0", "three views"]
)
def test_training_online_is_training_from_float32_features(
    tmp_path: Path,
    dataset: Dataset,
    teachers: dict[str, NetworkTeacher],
    phase: PhaseConfig,
    views: ViewsConfig,
) -> None:
    """Step by step; the online store holds no features at all, and the student's image is jittered."""
    stored = filled_store(tmp_path / "filled.zarr", dataset, views, teachers)
    bare = empty_store(tmp_path / "bare.zarr", dataset, views)
    cached, online = make_run(tmp_path / "cached", phase), make_run(
        tmp_path / "online", phase.model_copy(update={"targets": "online"})
    )  # fmt: skip
    train(cached, dataset, stored)
    train(replace(online, load_teachers=lambda device: teachers), dataset, bare)
    logs = [losses(run.folder) for run in (cached, online)]
    assert len(logs[0]) == phase.steps
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = [load_file(run.folder / "student.safetensors") for run in (cached, online)]
    assert (
        weights[0]["tsap.resnet.0.down.bias"].abs().min() > 1e-3
    )  # was zero: something is learned
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def losses(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [
            {name: float(text) for name, text in row.items() if "loss" in name or "dist" in name}
            for row in csv.DictReader(file)
        ]


def test_a_live_teacher_gets_the_clean_pixels_in_its_own_preprocessing(
    tmp_path: Path, dataset: Dataset, teachers: dict[str, NetworkTeacher]
) -> None:
    store = empty_store(tmp_path / "bare.zarr", dataset, ViewsConfig())
    spec = StreamSpec(
        ids=store.images.ids,
        teachers=("resnet",),
        tasks=(),
        image_size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        jitter=True,
        seed=0,
        cache_bytes=1 << 20,
    )
    stream = TargetStream(spec, dataset, store, {"resnet": teachers["resnet"]})
    batches = [stream.__getitems__([Draw(epoch=epoch, index=0)] * 2) for epoch in (0, 1)]
    assert not batches[0].images.equal(batches[1].images)  # jittered
    inputs = batches[0].targets["resnet"]
    assert len(inputs) == 1
    assert (inputs[0].shape, inputs[0].dtype) == ((2, 64, 64, 3), torch.uint8)
    assert inputs[0].equal(batches[1].targets["resnet"][0])
    answer = OnlineTargets(teachers, stream.levels)(batches[0])["resnet"]
    assert [tuple(level.shape[:3]) for level in answer.levels] == [
        (2, *grid) for _, grid in stream.levels["resnet"]
    ]
    assert not any(level.is_inference() or level.requires_grad for level in answer.levels)


def test_cached_training_without_features_says_what_is_missing(
    tmp_path: Path, dataset: Dataset
) -> None:
    store = empty_store(tmp_path / "bare.zarr", dataset, ViewsConfig())
    with pytest.raises(TrainingError, match=r"features of vit, resnet; .* or set targets: online"):
        train(make_run(tmp_path / "run", PHASE), dataset, store)


def test_reuse_of_stored_grids_needs_stored_grids() -> None:
    with pytest.raises(ValueError, match="targets: online has none"):
        PhaseConfig.model_validate(
            {"steps": 1, "learning_rate": 1.0, "targets": "online", "reuse": {"flip": 0.9}}
        )
