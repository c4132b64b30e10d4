"""Memory that runs out beside the teacher: in encoding, in the drift report, in calibration."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.views import draw_views
from stages.extract import calibrate, drift
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.encode import Encoder
from stages.extract.errors import BatchTooLargeError
from stages.extract.run import extract
from stages.progress import NoProgress
from store.create import create_store
from store.drift import LevelDrift
from store.reader import FeatureStore
from store.testing import file_contents
from store.verify import verify

COUNT = 7
VIEW = (32, 48)
SETTINGS = ExtractConfig(batch_size=4, device="cpu", equivariance_images=0)
CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ImageSource, ...]:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"no image")
    return list_folder(folder)


def new_store(path: Path, sources: tuple[ImageSource, ...]) -> Path:
    images = index_images(sources, max_bad=0.9, progress=NoProgress())
    create_store(path, images, draw_views(images, VIEW, ViewsConfig(count=1)))
    return path


def test_encoding_goes_on_with_fewer_images(
    tmp_path: Path,
    sources: tuple[ImageSource, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = new_store(tmp_path / "plain.zarr", sources)
    extract(plain, sources, VIEW, {"vit": CONFIG}, SETTINGS, NoProgress())
    encode = Encoder.__call__

    def limited(self: Encoder, features: object, valid: np.ndarray) -> object:
        if len(valid) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return encode(self, features, valid)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "__call__", limited)
    halved = new_store(tmp_path / "halved.zarr", sources)
    with caplog.at_level(logging.WARNING):
        extract(halved, sources, VIEW, {"vit": CONFIG}, SETTINGS, NoProgress())
    assert file_contents(halved) == file_contents(plain)
    assert [record.getMessage()[:68] for record in caplog.records] == [
        "encoding for teacher 'vit': out of memory with 4 images at once, goi",
        "encoding for teacher 'vit': out of memory with 2 images at once, goi",
    ]
    assert verify(halved).clean


def test_the_drift_report_goes_on_with_fewer_images(
    tmp_path: Path, sources: tuple[ImageSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = {"low": CONFIG.model_copy(update={"precision": "bf16"})}
    plain = new_store(tmp_path / "plain.zarr", sources)
    expected = extract(plain, sources, VIEW, low, SETTINGS, NoProgress())[0].drift
    compared = drift._compared

    def limited(rough: torch.Tensor, fine: torch.Tensor) -> object:
        if len(rough) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
        return compared(rough, fine)

    monkeypatch.setattr(drift, "_compared", limited)
    halved = new_store(tmp_path / "halved.zarr", sources)
    found = extract(halved, sources, VIEW, low, SETTINGS, NoProgress())[0].drift
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, LevelDrift)
        assert one.cosine_mean == pytest.approx(other.cosine_mean, rel=1e-4)


def test_calibration_that_does_not_fit_says_what_to_do(
    tmp_path: Path, sources: tuple[ImageSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(calibrate.Calibration):
        def add(self, levels: object, *, held_out: bool) -> None:
            raise MemoryError

    monkeypatch.setattr(calibrate, "Calibration", Full)
    store = new_store(tmp_path / "store.zarr", sources)
    coded = {"vit": CONFIG.model_copy(update={"codec": "int8"})}
    with pytest.raises(
        BatchTooLargeError, match=r"'vit' on 6 images ran out of memory \(MemoryError\); choose few"
    ):
        extract(store, sources, VIEW, coded, SETTINGS, NoProgress())
    assert FeatureStore(store).unfinished == {"vit"} or not FeatureStore(store).teachers


def test_images_that_do_not_fit_say_what_to_do(
    tmp_path: Path, sources: tuple[ImageSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "store.zarr", sources)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("stages.extract.reading.decode_data", fail)
    with pytest.raises(BatchTooLargeError, match=r"reading 3 images for teacher 'vit' ran out"):
        extract(store, sources, VIEW, {"vit": CONFIG}, SETTINGS, NoProgress())
