"""What a command that looks has to show."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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


def records(lines: "Sequence[DataclassInstance]", *remarks: str) -> Report:
    """Lay out dataclass instances of one kind, a row each; there must be one."""
    return Report(
        columns=tuple(field.name.replace("_", " ") for field in fields(lines[0])),
        rows=tuple(tuple(asdict(line).values()) for line in lines),
        data={"scores": [asdict(line) for line in lines]},
        remarks=remarks,
    )
