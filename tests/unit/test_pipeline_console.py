"""What machines read is JSON, whatever the numbers are."""

import json
import math

import pytest

from pipeline import console
from pipeline.report import Report


def test_numbers_that_json_does_not_have_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"loss": math.nan, "terms": [{"norm": math.inf}, (-math.inf, 1.5)], "steps": 3}
    console.show("step", Report(columns=(), rows=(), data=data), as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"loss": "nan", "terms": [{"norm": "inf"}, ["-inf", 1.5]], "steps": 3}
