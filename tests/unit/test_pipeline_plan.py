"""`sak plan`: what it foretells is what extraction writes; nothing is left on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from pipeline import planning
from pipeline.cli import app
from pipeline.params import load_params
from pipeline.plan_costs import Comparison, Pace, duration, one_pass
from pipeline.plan_survey import PlanRequest
from stages.progress import NoProgress
from tests.conftest import tiny_project


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three codecs and a small file for the disk's speed, so that a plan takes a second."""
    monkeypatch.setattr(planning, "LADDER", ("float32", "int8", "pca-2bit"))
    monkeypatch.setattr(planning, "DISK_BYTES", 2**20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edit(path: Path, **changes: Any) -> None:
    params = yaml.safe_load(path.read_text())
    params.update(changes)
    path.write_text(yaml.safe_dump(params))


def bytes_and_files(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def test_planned_bytes_and_files_are_those_of_the_extraction(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    first = project["teachers"]["first"]
    project["teachers"] = {
        "floats": {**first, "resolutions": ["native", [2, 3]]},
        "fitted": {**first, "levels": [1, 3], "codec": "pca-3bit"},
        "bytes": {**first, "levels": [3], "codec": "int8-pca8"},
    }
    project["extract"] = {"batch_size": 4, "covariance": True}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(project))
    assert run("index", "--params", path).exit_code == 0

    before = sorted(tmp_path.rglob("*"))
    result = run("plan", "--params", path, "--measure-images", 9, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert sorted(tmp_path.rglob("*")) == before
    planned = json.loads(result.stdout)

    assert run("extract-teachers", "--params", path).exit_code == 0
    store = Path(project["store"])
    assert bytes_and_files(store) == (planned["plan"]["bytes"], planned["plan"]["files"])
    for name, codec in (("floats", "float16"), ("fitted", "pca-3bit"), ("bytes", "int8-pca8")):
        foretold = planned["codecs"][name][codec]
        assert bytes_and_files(store / name) == (foretold["bytes"], foretold["files"])


def test_scenes_need_not_be_rendered_and_nothing_stays(tiny_params: Path) -> None:
    result = run("plan", "--params", tiny_params, "--measure-images", 4,
                 "--price-per-gb-month", 0.02, "--price-per-hour", 2.5, "--epochs", 3)  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert [path.name for path in tiny_params.parent.iterdir()] == ["params.yaml"]
    for part in ("float16 (asked for)", "int8", "bottleneck", "it fits", "break even", "second",
                 "after 3 epochs", "price of the extraction"):  # fmt: skip
        assert part in result.stdout


def test_more_images_than_there_are_and_a_disk_that_is_too_small(tiny_params: Path) -> None:
    result = run("plan", "--params", tiny_params, "--measure-images", 3, "--images", 10**12)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "IT DOES NOT FIT" in result.stdout
    assert "1,000,000,000,000" in result.stdout


def test_what_the_store_holds_already_needs_no_room(tiny_params: Path) -> None:
    params = load_params(tiny_params)
    request = PlanRequest(measure_images=3)
    survey = planning.survey(params, request, NoProgress())
    assert survey.there == 0
    extracted = Path(params.store) / "first"
    extracted.mkdir(parents=True)
    (extracted / "some.bin").write_bytes(bytes(1000))
    again = planning.survey(params, request, NoProgress())
    assert again.there == 1000
    assert again.disk is not None
    assert again.fits(again.disk.free_bytes + 1000)
    assert not again.fits(again.disk.free_bytes + 1001)


def test_budget_prints_lines_that_extraction_keeps_within_the_budget(tiny_params: Path) -> None:
    options = ("--params", tiny_params, "--measure-images", 9)
    asked = json.loads(run("plan", *options, "--json").stdout)["plan"]["bytes"]
    budget = asked - 2000
    result = run("plan", *options, "--budget", budget)
    assert result.exit_code == 0, (result.output, result.exception)
    listed = yaml.safe_load(result.stdout[result.stdout.index("teachers:\n") :])["teachers"]
    assert listed.keys() == {"first", "second"}

    params = yaml.safe_load(tiny_params.read_text())
    for name, lines in listed.items():
        params["teachers"][name].update(lines)
    tiny_params.write_text(yaml.safe_dump(params))
    for command in ("index", "extract-teachers"):
        assert run(command, "--params", tiny_params).exit_code == 0
    found, _ = bytes_and_files(Path(params["store"]))
    assert found <= budget


def test_a_budget_that_nothing_fits_names_the_smallest(tiny_params: Path) -> None:
    result = run("plan", "--params", tiny_params, "--measure-images", 3, "--budget", "1kB")
    assert result.exit_code == 2
    assert "fits --budget 1.0 kB: the smallest is" in " ".join(result.stderr.split())


@pytest.mark.parametrize("text", ["500 GBs", "much", "", "0", "-3GB"])
def test_a_budget_that_is_no_size_shows_an_example(tiny_params: Path, text: str) -> None:
    result = run("plan", "--params", tiny_params, f"--budget={text}")
    assert result.exit_code == 2
    assert "500GB" in result.stderr
    assert "Traceback" not in result.stderr


def test_too_few_images_and_no_parameter_file(tiny_params: Path, tmp_path: Path) -> None:
    assert run("plan", "--params", tiny_params, "--measure-images", 1).exit_code == 2
    missing = run("plan", "--params", tmp_path / "other.yaml")
    assert missing.exit_code == 2
    assert "no parameter file" in missing.stderr


def test_object_storage_is_planned_without_a_disk(tiny_params: Path) -> None:
    edit(tiny_params, store="memory://bucket/features.zarr")
    result = run("plan", "--params", tiny_params, "--measure-images", 3)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "not measured on object storage" in result.stdout
    assert "not known" in result.stdout


def test_steps_add_up_on_the_cpu_and_overlap_on_a_gpu() -> None:
    cpu = Pace(decode=4.0, forward=3.0, encode=2.0, write=1.0, overlap=False)
    assert (cpu.seconds, cpu.bottleneck) == (9, "decode")
    disk = Pace(decode=4.0, forward=3.0, encode=2.0, write=11.0, overlap=False)
    assert (disk.seconds, disk.bottleneck) == (11, "write")
    gpu = Pace(decode=4.0, forward=5.0, encode=2.0, write=1.0, overlap=True)
    assert (gpu.seconds, gpu.bottleneck) == (5, "forward")
    slow = Pace(decode=7.0, forward=3.0, encode=2.0, write=None, overlap=True)
    assert (slow.seconds, slow.bottleneck) == (7, "decode")


def test_one_pass_decodes_once() -> None:
    cpu = Pace(decode=4.0, forward=3.0, encode=2.0, write=1.0, overlap=False)
    assert one_pass([cpu, cpu, cpu], [3.0, 3.0, 3.0]) == 3 * 9 - 2 * 3
    gpu = Pace(decode=4.0, forward=1.0, encode=0.5, write=0.5, overlap=True)
    assert one_pass([gpu, gpu], [3.0, 3.0]) == 5


@pytest.mark.parametrize(
    ("once", "cached", "online", "expected"),
    [
        (10.0, 1.0, 6.0, 3),
        (9.0, 1.0, 6.0, 2),
        (0.0, 1.0, 2.0, 1),
        (10.0, 2.0, 2.0, None),
        (10.0, 3.0, 2.0, None),
    ],
)
def test_break_even_is_the_first_epoch_that_is_faster(
    once: float, cached: float, online: float, expected: int | None
) -> None:
    def faster(epoch: int) -> bool:
        at = Comparison(once=once, cached=cached, online=online, epochs=float(epoch))
        return at.cached_total < at.online_total

    assert Comparison(once=once, cached=cached, online=online, epochs=1.0).break_even == expected
    assert [epoch for epoch in range(1, 9) if faster(epoch)][:1] == (
        [] if expected is None else [expected]
    )


def test_durations_are_readable() -> None:
    shown = [duration(seconds) for seconds in (0.0123, 90.0, 600.0, 10_000.0, 1_000_000.0)]
    assert shown == ["0.0123 s", "90 s", "10 min", "2.78 h", "11.6 days"]
