"""`sak doctor`: every check can fail, says why, and says what to do."""

import json
import os
import shutil
import socket
import urllib.error
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from typer.testing import CliRunner

from pipeline import doctor_machine, doctor_weights
from pipeline.cli import app
from pipeline.doctor import check_dataset, check_store, diagnose
from pipeline.doctor_check import Check
from pipeline.doctor_weights import check_teacher
from pipeline.params import load_params
from stages.extract.config import TeacherConfig
from store.disk import Disk
from store.testing import sample_images, sample_teacher, sample_views, write_store
from store.writer import FeatureWriter, create_store

DINO = TeacherConfig(source="timm:vit_base_patch14_dinov2.lvd142m")


def states(*arguments: str | Path, code: int = 0) -> dict[str, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return {check["name"]: check["state"] for check in json.loads(result.stdout)["checks"]}


def test_without_parameters_the_machine_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = states()
    assert found["parameters"] == "warn"
    assert {"python", "libraries", "processors", "memory", "gpu", "git", "dvc", "disk"} < set(found)
    assert list(tmp_path.iterdir()) == []
    assert states("--params", "none.yaml", code=3)["parameters"] == "fail"
    (tmp_path / "params.yaml").write_text("image_size: 3")
    assert states(code=3)["parameters"] == "fail"


def test_a_project_from_nothing_to_finished(tiny_params: Path, tmp_path: Path) -> None:
    options = ("--params", tiny_params)
    found = states(*options)
    assert {found[name] for name in ("images", "teacher first", "store", "disk")} == {"ok"}
    assert "features of first" not in found
    for command in (("index",), ("extract-teachers", "first")):
        CliRunner().invoke(app, [*command, "--params", str(tiny_params)], catch_exceptions=False)
    report, healthy = diagnose(tiny_params, wanted=True)
    rows = {row[0]: row for row in report.rows}
    assert healthy
    assert rows["features of first"][2] == "finished"
    assert "`sak extract-teachers second`" in str(rows["features of second"][2])
    assert "9 of 9 decoded" in str(rows["images"][2])
    result = CliRunner().invoke(app, ["doctor", *map(str, options)])
    assert f"{sum(row[1] == 'ok' for row in report.rows)} ok" in result.output


def test_python_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 1))
    assert doctor_machine.check_python().state == "fail"
    needs = ["numpy>=99", "nosuchlibrary>=1", "pyyaml>=6", "moto>=99; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    check = doctor_machine.check_libraries()
    assert check.state == "fail"
    assert "numpy is" in check.found
    assert "(wanted >=99)" in check.found
    assert "nosuchlibrary is not installed" in check.found
    assert "moto" not in check.found
    assert "make .venv/ready" in check.advice


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert doctor_machine.check_processors() == Check(name="processors", state="ok", found="4")
    files = {
        1: {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": str(2**30)},
        2: {"cpu.max": "150000 100000", "memory.max": str(2**30)},
    }[version]  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    check = doctor_machine.check_processors()
    assert (check.state, check.found) == ("warn", "4, of which the container gets 1.5")
    assert "OMP_NUM_THREADS=2" in check.advice
    check = doctor_machine.check_memory()
    assert (check.state, check.found) == ("warn", "the container gets 1.1 GB")


def test_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor_machine.check_processors().state == "ok"
    monkeypatch.setattr(doctor_machine, "_meminfo", lambda: {"MemAvailable": 2**40})
    assert doctor_machine.check_memory().state == "ok"
    monkeypatch.setattr(doctor_machine, "_meminfo", dict)
    assert doctor_machine.check_memory().state == "warn"


def gpu(monkeypatch: pytest.MonkeyPatch, available: bool, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


def test_gpu_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path / "version")
    gpu(monkeypatch, available=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor_machine.check_gpu("auto").state == "warn"
    assert doctor_machine.check_gpu("cpu").state == "ok"
    assert "cuda:1 asked for" in doctor_machine.check_gpu("cuda:1").found
    assert doctor_machine.check_gpu("cuda:1").state == "fail"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  x"
    )
    check = doctor_machine.check_gpu("auto")
    assert (check.state, check.found) == ("fail", "driver 550.54.15, but torch sees no GPU")
    gpu(monkeypatch, available=True)
    check = doctor_machine.check_gpu("auto")
    assert (check.state, check.found) == ("ok", "H200, driver 550.54.15, bf16")
    gpu(monkeypatch, available=True, bf16=False)
    assert doctor_machine.check_gpu("auto").state == "warn"


def test_git_and_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = [check.found for check in doctor_machine.check_tools()]
    assert found == ["not installed", "not on the path"]
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    advice = [check.advice for check in doctor_machine.check_tools()]
    assert ["init" in text for text in advice] == [True, True]
    (tmp_path / ".git").mkdir()
    (tmp_path / ".dvc").mkdir()
    assert [check.state for check in doctor_machine.check_tools()] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("free", "rate", "needed", "state"),
    [
        (10**12, 1e9, 10**9, "ok"),
        (10**12, 1e9, None, "ok"),
        (10**12, 1e7, 10**9, "warn"),
        (10**8, 1e9, None, "warn"),
        (10**12, 1e9, 2 * 10**12, "fail"),
        (10**10, 1e9, 10**10 - 10**7, "fail"),  # less than extraction keeps free
        (10**8, 1e9, 0, "warn"),  # all is written
    ],
)
def test_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    rate: float,
    needed: int | None,
    state: str,
) -> None:
    disk = Disk(free_bytes=free, write_rate=rate, read_rate=rate)
    monkeypatch.setattr(doctor_machine, "measure_disk", lambda path, size: disk)
    assert doctor_machine.check_disk(tmp_path / "store", needed).state == state


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, size: int) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor_machine, "measure_disk", refuse)
    check = doctor_machine.check_disk(tmp_path / "store", None)
    assert check.state == "fail"
    assert "cannot be written: Read-only file system" in check.found


def test_a_store_that_this_user_may_not_open(
    tiny_params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may do anything, so the refusals are made here."""
    store = tmp_path / "features.zarr"
    CliRunner().invoke(app, ["index", "--params", str(tiny_params)], catch_exceptions=False)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != store and access(path, mode))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "zarr.json"))

    monkeypatch.setattr("pipeline.doctor.summarise", refuse)
    report, healthy = diagnose(tiny_params, wanted=True)
    rows = {row[0]: row for row in report.rows}
    assert not healthy
    assert (rows["disk"][1], rows["store"][1]) == ("fail", "fail")
    assert "cannot be written" in str(rows["disk"][2])
    assert rows["store"][2] == f"{store}/zarr.json: Permission denied"
    assert "permissions" in str(rows["store"][3])


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("no", response=mock.Mock(headers={}, status_code=401))
    return kind("no")


@pytest.mark.parametrize(
    ("kind", "found", "advice"),
    [
        (errors.GatedRepoError, "is gated", "hf auth login"),
        (errors.RepositoryNotFoundError, "does not exist", "correct `source:`"),
        (errors.EntryNotFoundError, "has no model.safetensors", "checkpoint:"),
        (errors.OfflineModeIsEnabled, "does not answer", "checkpoint:"),
        (ConnectionError, "does not answer", "copy its hub cache"),
    ],
)
def test_weights_that_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], found: str, advice: str
) -> None:
    def refuse(url: str, timeout: float) -> None:
        assert timeout <= 10
        raise hub_error(kind)

    monkeypatch.setattr(doctor_weights, "_is_here", lambda published: False)
    monkeypatch.setattr(doctor_weights, "_answers", lambda address: True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    check, spec = check_teacher("dino", DINO, (224, 224))
    assert (check.state, spec) == ("fail", None)
    assert found in check.found
    assert "timm/vit_base_patch14_dinov2.lvd142m" in check.found
    assert advice in check.advice


def test_weights_that_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_weights, "_is_here", lambda published: False)
    monkeypatch.setattr(doctor_weights, "_answers", lambda address: True)
    told = mock.Mock(size=346_000_000)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: told)
    check, _ = check_teacher("dino", DINO, (224, 224))
    assert (check.state, check.found.partition(" from")[0]) == ("ok", "346.0 MB to download")


def test_no_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(address: object, timeout: float) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub's client would try again and again")

    monkeypatch.setattr(doctor_weights, "_is_here", lambda published: False)
    monkeypatch.setattr(socket, "create_connection", unplugged)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
    for source in (DINO.source, "open_clip:ViT-B-16/laion2b_s34b_b88k"):
        check, _ = check_teacher("it", TeacherConfig(source=source), (224, 224))
        assert check.state == "fail"
        assert "cannot be reached" in check.found
        assert "copy its hub cache" in check.advice


def test_weights_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(request: object, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    published = doctor_weights._Published(url="https://host/weights.pth")
    assert not doctor_weights._is_here(published)
    monkeypatch.setattr("urllib.request.urlopen", unplugged)
    check = doctor_weights._reach("teacher x", published)
    assert (check.state, "https://host/weights.pth cannot be reached" in check.found) == (
        "fail",
        True,
    )


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"source": "timm:vit_tiny_patch16_22"}, "did you mean"),
        (
            {"source": "timm:resnet10t", "checkpoint": "/nowhere/x.pth"},
            "no weights file at /nowhere",
        ),
        ({"source": "timm:resnet10t", "checkpoint": "random", "levels": [77]}, "77"),
    ],
)
def test_teachers_that_cannot_be_built(config: dict[str, Any], found: str) -> None:
    check, _ = check_teacher("it", TeacherConfig.model_validate(config), (32, 48))
    assert check.state == "fail"
    assert found in check.found


def folder_params(tiny_params: Path, tmp_path: Path, **changes: object) -> Path:
    values = yaml.safe_load(tiny_params.read_text()) | {"tasks": [], **changes}
    values.setdefault("data", {})
    values["data"] = {"kind": "folder", "root": str(tmp_path / "pictures")}
    path = tmp_path / "folder.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_images(tiny_params: Path, tmp_path: Path) -> None:
    from PIL import Image

    params = load_params(folder_params(tiny_params, tmp_path))
    assert check_dataset(params)[0].state == "fail"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.png").write_bytes(b"")
    check, count = check_dataset(params)
    assert (check.state, count) == ("fail", 1)
    assert "empty file" in check.found
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "good.png")
    assert (check_dataset(params)[0].state, check_dataset(params)[1]) == ("warn", 2)


def store_states(path: Path, params: Path) -> dict[str, str]:
    return {check.name: check.state for check in check_store(path, load_params(params))}


def test_the_store(tiny_params: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.zarr"
    params = folder_params(tiny_params, tmp_path, image_size=[24, 32])
    create_store(path, sample_images(9), sample_views(9))
    with FeatureWriter.open(path, sample_teacher("first")):
        assert store_states(path, params)["features of first"] == "warn"  # being written
    check = check_store(path, load_params(params))[1]
    assert (check.state, check.found) == ("warn", "0% extracted")
    shutil.rmtree(path)
    write_store(path, sample_images(9), sample_teacher("first"))
    assert store_states(path, params) == {
        "store": "ok", "features of first": "ok", "features of second": "ok",
    }  # fmt: skip
    assert store_states(path, tiny_params)["store"] == "fail"  # views of another size
    (path / "zarr.json").write_text("{")
    assert store_states(path, params) == {"store": "fail"}


def test_room_for_the_store(tiny_params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def measured(path: Path, needed: int | None) -> Check:
        asked.append(needed)
        return Check(name="disk", state="ok", found="")

    monkeypatch.setattr("pipeline.doctor.check_disk", measured)
    diagnose(tiny_params, wanted=True)
    rows, cells, channels, levels = 9, 4 * 6, 24, 8  # two teachers of four levels, float16
    assert asked == [rows * 2 * (levels * cells * channels + 2 * channels)]
