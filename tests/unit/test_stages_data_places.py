"""Bytes from files, URLs and tars: what is tried again, what is final, what is never waited for."""

import errno
import http.server
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from PIL import Image

from stages.data import places
from stages.data.images import ImageError, ImageOutOfReachError, decode_image, read_image, read_size
from stages.data.places import PAUSES, TarMember, UnreadableError, Url, address, read_bytes
from stages.data.sources import SourceError, list_folder, list_manifest


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(places, "_sleep", slept.append)
    return slept


def picture(value: int = 7) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server:
    """An HTTP server on this machine: answers by path, the last one of a list again and again."""

    def __init__(self, root: str, answers: dict[str, list[int | bytes]]) -> None:
        self.root = root
        self.answers = answers
        self.asked = 0


@pytest.fixture
def server() -> Iterator[Server]:
    answers: dict[str, list[int | bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known.asked += 1
            left = answers.get(self.path.partition("?")[0], [404])
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, int):
                self.send_error(answer)
                return
            self.send_response(200)  # without a length: the body ends with the connection
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        known = Server(f"http://127.0.0.1:{listening.server_port}", answers)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield known
        listening.shutdown()
        thread.join()


def test_an_image_at_a_web_address(server: Server) -> None:
    server.answers["/a.png"] = [picture()]
    place = Url(f"{server.root}/a.png")
    assert (decode_image(place) == 7).all()
    assert read_size(place) == (4, 6)


def test_a_busy_server_is_asked_again(server: Server, pauses: list[float]) -> None:
    server.answers["/a.png"] = [503, 429, picture()]
    assert read_image(Url(f"{server.root}/a.png")).pixels.shape == (4, 6, 3)
    assert len(pauses) == 2
    assert all(most / 2 <= slept <= most for slept, most in zip(pauses, PAUSES, strict=False))


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "not found"), (403, "the server answers 403")]
)
def test_a_final_answer_is_not_asked_again(
    server: Server, pauses: list[float], status: int, reason: str
) -> None:
    server.answers["/a.png"] = [status]
    with pytest.raises(ImageError) as caught:
        read_image(Url(f"{server.root}/a.png"))
    assert caught.value.reason == reason
    assert not isinstance(caught.value, ImageOutOfReachError)
    assert (server.asked, pauses) == (1, [])


def test_what_does_not_pass_is_out_of_reach(server: Server, pauses: list[float]) -> None:
    server.answers["/a.png"] = [500]
    with pytest.raises(ImageOutOfReachError) as caught:
        read_image(Url(f"{server.root}/a.png?signature=secret"))
    assert caught.value.reason == "the server answers 500"
    assert "secret" not in str(caught.value)
    assert len(pauses) == len(PAUSES) == server.asked - 1


def test_nobody_listens(pauses: list[float]) -> None:
    with pytest.raises(ImageOutOfReachError, match="cannot be read: Connection refused"):
        read_image(Url("http://127.0.0.1:1/a.png"))
    assert len(pauses) == len(PAUSES)


def test_a_body_without_end_is_left_at_the_limit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MAX_BYTES", 2**20)
    server.answers["/a.png"] = [bytes(16 * 2**20)]
    with pytest.raises(UnreadableError, match="more than 1 MiB, which no image has"):
        read_bytes(Url(f"{server.root}/a.png"))


def test_a_web_page_is_no_image(server: Server) -> None:
    server.answers["/a.png"] = [b"<html>please log in</html>"]
    with pytest.raises(ImageError, match="not an image that Pillow knows"):
        read_image(Url(f"{server.root}/a.png"))


@pytest.mark.parametrize("passing", [True, False])
def test_a_disk_is_tried_again_where_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], passing: bool
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    code = errno.EIO if passing else errno.EACCES
    real, failures = os.open, [OSError(code, os.strerror(code))]

    def fail_once(*arguments: object, **options: object) -> int:
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(os, "open", fail_once)
    if passing:
        assert read_image(tmp_path / "a.png").pixels.shape == (4, 6, 3)
        assert len(pauses) == 1
    else:
        with pytest.raises(ImageError, match="cannot be read: Permission denied"):
            read_image(tmp_path / "a.png")
        assert pauses == []


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name in ("a.png", "b.png"):
        for read in (read_image, read_size):
            with pytest.raises(ImageError, match="not a regular file"):
                read(tmp_path / name)


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(places.MAX_BYTES + 1)
    with pytest.raises(ImageError, match="more than 512 MiB"):
        read_image(tmp_path / "a.png")
    member = TarMember(tar=tmp_path / "a.png", name="x.png", offset=0, size=2**40)
    with pytest.raises(ImageError, match="more than 512 MiB"):
        read_image(member)


def test_a_tar_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(100))
    with pytest.raises(UnreadableError, match="shorter than when it was listed"):
        read_bytes(TarMember(tar=tmp_path / "a.tar", name="x.png", offset=90, size=20))


def test_a_fault_of_ours_is_no_bad_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(path: Path) -> None:
        raise KeyError("slip")

    monkeypatch.setattr(places, "open_file", wrong)
    with pytest.raises(KeyError):
        read_image(tmp_path / "a.png")


def test_addresses(tmp_path: Path) -> None:
    assert address(str(tmp_path)) == tmp_path
    assert address(f"file://{tmp_path}") == tmp_path
    url = address("https://me:word@host/x/a.png?token=1")
    assert str(url) == "https://host/x/a.png"
    assert isinstance(url, Url)
    assert url.name == "a.png"
    assert str(Url("s3://bucket/a?b.png")) == "s3://bucket/a?b.png"  # a name, not a query
    with pytest.raises(UnreadableError, match="no such kind of address"):
        read_bytes(Url("nosuch://a/b.png"))


@pytest.fixture
def memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.pipe({"/pictures/b/x.png": picture(1), "/pictures/a.PNG": picture(2)})
    files.pipe({"/pictures/.hidden.png": b"", "/pictures/notes.txt": b""})
    yield "memory://pictures"
    files.rm("/pictures", recursive=True)


def test_a_folder_at_a_url(memory: str) -> None:
    sources = list_folder(Url(memory))
    assert [source.id for source in sources] == ["a", "b/x"]
    assert [decode_image(source.path)[0, 0, 0] for source in sources] == [2, 1]
    with pytest.raises(SourceError, match="holds no image"):
        list_folder(Url("memory://nothing"))
    with pytest.raises(SourceError, match="name the images in a manifest"):
        list_folder(Url("https://host/pictures"))


def test_a_bucket(s3_endpoint: str) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    client.put_object(Bucket="pictures", Key="some/a.png", Body=picture(3))
    (source,) = list_folder(Url("s3://pictures/some"))
    assert source.id == "a"
    assert (decode_image(source.path) == 3).all()
    with pytest.raises(ImageError) as caught:
        read_image(Url("s3://pictures/some/b.png"))
    assert caught.value.reason in ("not found", "cannot be read: No such file or directory")
    assert not isinstance(caught.value, ImageOutOfReachError)


def test_a_manifest_of_urls(memory: str, server: Server, tmp_path: Path) -> None:
    server.answers["/c.png"] = [picture(3)]
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path\nb/x.png\n{memory}/a.PNG\n{server.root}/c.png?key=1\n")
    sources = list_manifest(manifest, Url(memory))
    host = server.root.removeprefix("http://")
    assert [source.id for source in sources] == ["b/x", "a", f"{host}/c"]
    assert [decode_image(source.path)[0, 0, 0] for source in sources] == [1, 2, 3]


def test_a_link_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(picture())
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(SourceError, match=r"is a link back to .*, without end; remove the link"):
        list_folder(tmp_path)
