"""Commands as a person types them, for tests."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pipeline.cli import app


def sak(*arguments: str | Path, code: int = 0) -> str:
    """Run a command and return what it prints.

    Raises:
        AssertionError: it ends with another exit code, or shows a traceback.
    """
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def sak_json(*arguments: str | Path) -> dict[str, Any]:
    """Run a command with `--json` and return what it says."""
    loaded: dict[str, Any] = json.loads(sak(*arguments, "--json"))
    return loaded
