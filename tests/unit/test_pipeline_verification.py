"""`sak verify` as a gate: exit codes, the table, and JSON that a machine can read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.verification import LiveRequest, verify_store
from stages.progress import NoProgress
from store.reader import FeatureStore
from store.testing import sample_images, sample_teacher, write_store

SHARD = "small/stage_1/native/c.1.0.0.0"


def sak(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_json(*arguments: object, code: int) -> dict[str, Any]:
    result = sak("verify", *arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", sample_images(6), sample_teacher())
    return tmp_path / "store"


def damage(store: Path) -> None:
    data = bytearray((store / SHARD).read_bytes())
    data[3] ^= 1
    (store / SHARD).write_bytes(data)


def test_a_clean_store_exits_with_0(store: Path) -> None:
    result = sak("verify", store)
    assert result.exit_code == 0
    assert "statistics" in result.stdout
    assert "clean; " in result.stdout
    assert "finding" not in result.stdout
    data = as_json(store, code=0)
    assert data["clean"] is True
    assert set(data["checks"]["small"].values()) == {0}
    assert (data["live"], data["repaired"]) == ([], [])


def test_findings_exit_with_3_and_say_what_mends_them(store: Path) -> None:
    damage(store)
    result = sak("verify", store)
    assert result.exit_code == 3
    for text in (
        "findings",
        "damage: small, stage_1/native, shard 1, row 4",
        "sak verify",
        "--repair",
    ):
        assert text in result.stdout
    data = as_json(store, code=3)
    assert data["clean"] is False
    assert data["checks"]["small"]["data"] == 1
    assert {entry["shard"] for entry in data["findings"]} == {1}
    assert {"severity", "check", "what", "mend", "row", "image"} <= data["findings"][0].keys()


def test_quick_reads_no_features(store: Path) -> None:
    damage(store)
    data = as_json(store, "--quick", code=0)
    assert "data" not in data["checks"]["small"]
    assert "feature files were not read" in sak("verify", store, "--quick").stdout


def test_repair_says_what_it_did(store: Path) -> None:
    damage(store)
    data = as_json(store, "--repair", code=3)
    assert data["repaired"] == [
        "small: shards 1 will be computed again by `sak extract-teachers small`"
    ]
    assert FeatureStore(store).unfinished == ("small",)
    assert as_json(store, code=0)["repaired"] == []  # an unfinished teacher is no finding


def test_mistakes_exit_with_2(store: Path, tmp_path: Path) -> None:
    result = sak("verify", store, "--teacher", "smal")
    assert result.exit_code == 2
    assert "did you mean 'small'?" in result.stderr
    assert sak("verify", tmp_path / "nowhere").exit_code == 2
    assert sak("verify", store, "--live", "--params", tmp_path / "no.yaml").exit_code == 2
    assert sak("verify", store, "--live", "--sample", 0).exit_code == 2


def test_the_epilog_names_the_exit_code() -> None:
    assert "3 verify or doctor found something" in " ".join(sak("--help").stdout.split())


def test_live_from_the_command_line(tmp_path: Path, tiny_params: Path) -> None:
    """Clean at first; then the parameter file asks for another teacher, and one it does not name."""
    values = yaml.safe_load(tiny_params.read_text())
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    values |= {"data": {"kind": "folder", "root": str(pictures)}, "tasks": []}
    tiny_params.write_text(yaml.safe_dump(values))
    assert sak("index", "--params", tiny_params).exit_code == 0
    assert sak("extract-teachers", "--params", tiny_params).exit_code == 0
    live = (values["store"], "--live", "--sample", 2, "--params", tiny_params)
    data = as_json(*live, code=0)
    assert {(one["teacher"], one["rows"]) for one in data["live"]} == {("first", 2), ("second", 2)}
    values["teachers"]["first"]["mean"] = [0.4, 0.4, 0.4]
    values["teachers"]["third"] = values["teachers"].pop("second")
    tiny_params.write_text(yaml.safe_dump(values))
    data = as_json(*live, code=3)
    assert data["checks"]["first"]["live"] > 1
    assert any("config.mean" in entry["what"] for entry in data["findings"])
    remark = next(entry for entry in data["findings"] if entry["teacher"] == "second")
    assert (remark["severity"], remark["check"]) == ("remark", "live")
    result = sak("verify", *live, "--teacher", "second")
    assert result.exit_code == 2
    assert "no teacher named second in the parameter file; it has first, third" in result.stderr


def test_live_waits_until_damage_is_mended(store: Path, tiny_params: Path) -> None:
    from pipeline.params import load_params

    damage(store)
    live = LiveRequest(params=load_params(tiny_params), sample=2)
    report, clean = verify_store(store, [], False, False, live, NoProgress())
    assert not clean
    assert any("mend the damage first" in remark for remark in report.remarks)
