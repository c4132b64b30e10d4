"""What a command that fails says to people on standard error, and with `--json` to machines."""

import errno
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from stages.stopping import Terminated


def refused(*arguments: str | Path) -> tuple[Result, dict[str, object]]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    answer: dict[str, object] = json.loads(result.stdout)
    assert answer["exit_code"] == result.exit_code
    return result, answer


@pytest.mark.parametrize(
    "command",
    [
        ("index",), ("plan",), ("extract-teachers",), ("train-student", "distill"), ("evaluate",),
        ("probe",), ("gc",), ("verify", "nowhere.zarr"), ("inspect", "nowhere.zarr"),
        ("teachers", "check", "nobody:Nothing"),
    ],
)  # fmt: skip
def test_each_command_answers_in_json_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("image_size: 3\n")
    result, answer = refused(*command)
    assert result.exit_code == 2, result.output
    assert str(answer["error"]).strip()
    assert result.stderr.startswith("error: ")


def test_options_that_do_not_go_together_are_told_in_json_too(tiny_params: Path) -> None:
    options = ("--retry-quarantined", "--append", "--params", tiny_params)
    _, answer = refused("index", *options)
    assert "goes alone" in str(answer["error"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        (Terminated(), 143, "terminated; the same command goes on"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"), 2, "have the disk mounted"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "give this user the right"),
        (
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/a/b"),
            2,
            "make room; the same command",
        ),
    ],
)
def test_what_ended_a_command_and_how_to_go_on(
    tiny_params: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException, code: int, text: str,
) -> None:  # fmt: skip
    def end(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.extraction.extract_teachers", end)
    result, answer = refused("extract-teachers", "--params", tiny_params)
    assert result.exit_code == code
    assert text in str(answer["error"])
    assert text in result.stderr
    if isinstance(error, OSError):
        assert str(answer["error"]).startswith("/a/b: ")
