"""One line of `sak doctor`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, how it is, what was found, and what to do where it is not ok."""

    name: str
    state: State
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing is to be done."""
    return Check(name=name, state="ok", found=found)


def warn(name: str, found: str, advice: str) -> Check:
    """Work goes on, but not as well as it might."""
    return Check(name=name, state="warn", found=found, advice=advice)


def fail(name: str, found: str, advice: str) -> Check:
    """A command would fail."""
    return Check(name=name, state="fail", found=found, advice=advice)
