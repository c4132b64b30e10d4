"""Images at URLs are fetched by more threads than there are cores; decoding keeps to the cores."""

from io import BytesIO
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from stages.data.config import ViewsConfig
from stages.data.images import index_images
from stages.data.places import TarMember, Url, is_remote
from stages.data.sources import ImageSource
from stages.data.views import draw_views
from stages.extract import reading
from stages.extract.clock import threads
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.extract.reading import reading_threads
from stages.extract.run import extract
from stages.progress import NoProgress
from store.create import create_store
from store.verify import verify

COUNT = 16
VIEW = (32, 48)
CONFIG = TeacherConfig(source="timm:test_vit", checkpoint="random", levels=1)


@pytest.mark.parametrize("place", [Path("a.png"), Path("/b/c.png")])
def test_files_are_read_by_as_many_threads_as_cores(place: Path) -> None:
    inside = TarMember(tar=place, name="a", offset=0, size=1)
    assert not is_remote(place)
    assert not is_remote(inside)
    assert reading_threads([place, inside]) == threads()


def test_urls_and_tars_at_urls_by_more() -> None:
    url = Url("https://example.org/a.tar")
    assert reading_threads([Path("a.png"), url]) >= 16
    assert reading_threads([TarMember(tar=url, name="a", offset=0, size=1)]) >= 16


def test_sixteen_images_are_on_their_way_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, generator = fsspec.filesystem("memory"), np.random.default_rng(0)
    sources = []
    for number in range(COUNT):
        data = BytesIO()
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), np.uint8)).save(data, "png")
        files.pipe(f"/threads/{number}.png", data.getvalue())
        sources.append(ImageSource(id=str(number), path=Url(f"memory://threads/{number}.png")))
    images = index_images(sources, max_bad=0.0, progress=NoProgress())
    store = tmp_path / "store.zarr"
    create_store(store, images, draw_views(images, VIEW, ViewsConfig(count=1)))

    meeting, lock = Barrier(COUNT, timeout=60), Lock()
    decoding: list[int] = [0]
    most: list[int] = []
    read, decode = reading.read_data, reading.decode_data

    def met(place: Any) -> bytes:
        meeting.wait()  # breaks unless all of them are being read
        return read(place)

    def counted(place: Any, data: bytes) -> Any:
        with lock:
            decoding[0] += 1
            most.append(decoding[0])
        image = decode(place, data)
        with lock:
            decoding[0] -= 1
        return image

    monkeypatch.setattr(reading, "read_data", met)
    monkeypatch.setattr(reading, "decode_data", counted)
    settings = ExtractConfig(batch_size=2, device="cpu", equivariance_images=0)
    (summary,) = extract(store, sources, VIEW, {"vit": CONFIG}, settings, NoProgress())
    assert summary.images == COUNT
    assert max(most) <= threads()
    assert verify(store).clean
