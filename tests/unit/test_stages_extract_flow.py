"""The flow of images through teachers: order, one decode, time per stage, batch size."""

import re
from collections import Counter
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.sources import ImageSource, list_folder
from stages.data.view import Box
from stages.data.views import draw_views
from stages.extract import reading
from stages.extract.batching import find_batch_size
from stages.extract.clock import StageClock, total
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.preprocess import Preprocessing
from stages.extract.reading import Recent
from stages.extract.run import extract, open_extraction, run_together
from stages.extract.teachers import Features, load_teacher
from stages.progress import NoProgress
from stages.stopping import Stop
from store.create import create_store
from store.reader import FeatureStore
from store.testing import file_contents

COUNT = 7
VIEW = (32, 48)
SETTINGS = ExtractConfig(batch_size=2, device="cpu", equivariance_images=0)
CONFIGS = {
    "vit": TeacherConfig(source="timm:test_vit", checkpoint="random", levels=2),
    "net": TeacherConfig(source="timm:test_resnet", checkpoint="random", levels=1, codec="int8"),
}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ImageSource, ...]:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    return list_folder(folder)


def new_store(path: Path, sources: tuple[ImageSource, ...], views: int = 1) -> Path:
    images = index_images(sources, max_bad=0.9, progress=NoProgress())
    create_store(path, images, draw_views(images, VIEW, ViewsConfig(count=views)))
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image is decoded from here on."""
    counts: Counter[str] = Counter()
    decode = reading.decode_data

    def counted(path: Path, data: bytes) -> object:
        counts[path.stem] += 1
        return decode(path, data)

    monkeypatch.setattr(reading, "decode_data", counted)
    return counts


@pytest.mark.parametrize("views", [1, 3])
def test_one_pass_decodes_once_and_writes_the_same_store(
    tmp_path: Path, sources: tuple[ImageSource, ...], decoded: Counter[str], views: int
) -> None:
    floats = {name: one.model_copy(update={"codec": "float16"}) for name, one in CONFIGS.items()}
    together = new_store(tmp_path / "together.zarr", sources, views)
    extract(together, sources, VIEW, floats, SETTINGS, NoProgress())
    assert decoded == {str(number): 1 for number in range(COUNT) if number != 3}
    apart = new_store(tmp_path / "apart.zarr", sources, views)
    for name, config in floats.items():
        extract(apart, sources, VIEW, {name: config}, SETTINGS, NoProgress())
    assert file_contents(together) == file_contents(apart)


def test_teachers_that_prepare_images_alike_share_their_inputs(
    tmp_path: Path, sources: tuple[ImageSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Counter[tuple[int, int]] = Counter()
    prepare = Preprocessing.__call__

    def counted(self: Preprocessing, image: np.ndarray, box: Box) -> torch.Tensor:
        prepared[self.frame.content] += 1
        return prepare(self, image, box)

    vit = CONFIGS["vit"]
    configs = {
        "vit": vit,
        "shifted": vit.model_copy(update={"mean": (0.1, 0.2, 0.3)}),
        "larger": vit.model_copy(update={"input_size": (64, 96)}),
    }
    path = new_store(tmp_path / "together.zarr", sources)
    loaded = [load_teacher(*one, VIEW, torch.device("cpu")) for one in configs.items()]
    extractions = [open_extraction(path, sources, VIEW, one, SETTINGS) for one in loaded]
    monkeypatch.setattr(Preprocessing, "__call__", counted)
    run_together(extractions, NoProgress(), Stop())
    assert prepared == {VIEW: COUNT - 1, (64, 96): COUNT - 1}
    store, level = FeatureStore(path), loaded[0].spec.levels[0].name
    first, other = (store.read(name, level, [0]) for name in ("vit", "shifted"))
    assert not np.allclose(first, other)  # each with its own mean all the same


def test_a_teacher_that_was_there_is_left_alone(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    path = new_store(tmp_path / "store.zarr", sources)
    extract(path, sources, VIEW, {"vit": CONFIGS["vit"]}, SETTINGS, NoProgress())
    before = file_contents(path / "vit")
    vit, net = extract(path, sources, VIEW, CONFIGS, SETTINGS, NoProgress())
    assert (vit.images, net.images) == (0, COUNT - 1)
    assert file_contents(path / "vit") == before
    assert set(FeatureStore(path).teachers) == {"vit", "net"}


def test_every_stage_is_timed(tmp_path: Path, sources: tuple[ImageSource, ...]) -> None:
    path = new_store(tmp_path / "store.zarr", sources)
    (summary,) = extract(path, sources, VIEW, {"vit": CONFIGS["vit"]}, SETTINGS, NoProgress())
    times = summary.stages
    assert times is not None
    work = {"read", "decode", "preprocess", "stack", "forward", "encode", "write"}
    assert times.seconds.keys() == work | {"wait for images", "wait for writing"}
    assert times.bottleneck in work
    assert 0 < times.forward_share <= 1
    assert times.gpu_hours is None
    assert times.busy.keys() == {"readers", "stack", "forward", "encode", "write"}


class Notes(NoProgress):
    """Keeps what the progress line shows."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def advance(self, count: int = 1, note: str = "") -> None:
        self.notes.append(note)


def test_the_progress_line_shows_speed_and_bottleneck(
    tmp_path: Path, sources: tuple[ImageSource, ...]
) -> None:
    path, progress = new_store(tmp_path / "store.zarr", sources), Notes()
    extract(path, sources, VIEW, {"vit": CONFIGS["vit"]}, SETTINGS, progress)
    shown = [note for note in progress.notes if note]
    assert len(shown) == -(-COUNT // 2)  # a line for each batch
    assert all(re.fullmatch(r"\d+\.\d images/s, [a-z]+ is the bottleneck", one) for one in shown)


def test_times_of_units_add_up() -> None:
    first, second = StageClock(streams=2), StageClock()
    first.add("forward", 6.0)
    first.add("encode", 4.0)
    second.add("forward", 1.0)
    second.add("wait for images", 9.0)
    both = total([first.times(5.0, on_gpu=False), second.times(3.0, on_gpu=True)])
    assert both is not None
    assert both.seconds == {"forward": 7.0, "encode": 4.0, "wait for images": 9.0}
    assert both.busy == {"forward": 4.0, "encode": 4.0}
    assert (both.elapsed, both.forward_share) == (8.0, 0.5)
    assert both.gpu_hours == 3.0 / 3600
    assert total([]) is None


def test_the_bottleneck_is_the_stage_whose_threads_are_busiest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stages.extract.clock.threads", lambda: 4)
    clock = StageClock()
    for stage, seconds in [
        ("decode", 6.0),
        ("read", 2.0),
        ("forward", 3.0),
        ("wait for images", 9.0),
    ]:
        clock.add(stage, seconds)
    assert clock.times(10.0, on_gpu=False).bottleneck == "forward"
    clock.add("decode", 6.0)
    assert clock.times(10.0, on_gpu=True).bottleneck == "decode"
    assert clock.times(3600.0, on_gpu=True).gpu_hours == 1


def test_who_comes_second_gets_what_the_first_decodes() -> None:
    images: Recent[int, np.ndarray] = Recent()
    meeting = Barrier(2, timeout=30)
    found: list[int] = []

    def decode(number: int) -> np.ndarray:
        meeting.wait()  # the other one has asked, or is about to
        return np.full((1, 1, 3), number, np.uint8)

    def refuse(number: int) -> np.ndarray:
        raise AssertionError(number)

    thread = Thread(target=lambda: found.append(int(images.get(5, decode)[0, 0, 0])))
    thread.start()
    meeting.wait()
    found.append(int(images.get(5, refuse)[0, 0, 0]))
    thread.join()
    assert found == [5, 5]


def test_decoded_images_stay_within_their_bytes() -> None:
    images: Recent[int, np.ndarray] = Recent(limit=10)
    asked: list[int] = []

    def decode(number: int) -> np.ndarray:
        asked.append(number)
        return np.zeros((1, 2, 3), np.uint8)  # 6 bytes

    for number in (0, 0, 1, 1, 0):
        images.get(number, decode)
    assert asked == [0, 1, 0]


class Limited:
    """A teacher for which memory ends at so many images."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[int] = []

    def __call__(self, images: Tensor) -> Features:
        self.tried.append(len(images))
        if len(images) > self.most:
            raise MemoryError
        return Features(levels={"only": images.float()}, pooled=None)


def test_the_batch_size_found_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.extract.batching._seconds", lambda *_: 1.0)  # larger is faster
    teacher = Limited(20)
    assert find_batch_size(teacher, torch.zeros(2, 2, 3)) == 16
    assert max(teacher.tried) == 32


def test_a_batch_that_is_no_faster_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 1.2, 4: 1.5, 8: 2.9}
    monkeypatch.setattr("stages.extract.batching._seconds", lambda _, batch: seconds[len(batch)])
    assert find_batch_size(Limited(99), torch.zeros(2, 2, 3)) == 4
