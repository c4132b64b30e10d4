"""What a command that looks has to show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A table for people, the same as JSON for machines, and remarks below the table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    data: dict[str, Any]
    remarks: tuple[str, ...] = ()


def two_columns(values: Mapping[str, Any], prefix: str = "") -> Report:
    """Lay out one summary as names and values; what is nested becomes `outer: inner`."""
    rows: list[tuple[object, ...]] = []
    for name, value in values.items():
        label = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += two_columns(value, f"{label}: ").rows or [(label, "none")]
        elif isinstance(value, tuple | list):
            rows.append((label, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((label, value))
    return Report(columns=("what", "value"), rows=tuple(rows), data=dict(values))
