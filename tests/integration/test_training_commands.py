"""`sak train-student` where a step goes wrong, as a person meets it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.testing import sak, sak_json
from stages.train.step import Step
from stages.train.stream import Batch


def spoiled(original: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(self: Step, batch: Batch, step: int, *rest: Any) -> Any:
        if step == 1:
            batch.images[0, 0, 0, 0] = float("nan")
        return original(self, batch, step, *rest)

    return gradient


def test_a_refused_step_is_computed_again_by_the_command_that_the_message_names(
    tiny_params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--params", tiny_params)
    sak("index", *options)
    sak("extract-teachers", *options)
    with monkeypatch.context() as patch:
        patch.setattr(Step, "gradient", spoiled(Step.gradient))
        message = sak("train-student", "distill", *options, code=2)
    named = re.search(r"`--replay (\S+)`", message)
    assert named is not None, message
    again = sak("train-student", "distill", "--replay", named[1], *options)
    assert "gradient norm" in again
    assert "distill first.0" in again
    terms = sak_json("train-student", "distill", "--replay", named[1], *options)
    assert terms["loss"] == "nan"  # JSON has no such number
    assert "no file at" in sak("train-student", "distill", "--replay", "x.pt", *options, code=2)
    assert sak_json("train-student", "distill", *options)["resumed_at"] == 1
