"""What a check of a store found, and what it looked at."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from store.audit import FeatureNumbers

Severity = Literal["damage", "suspect", "remark"]
"""Bytes that cannot be trusted; sound bytes that look wrong; worth knowing, no harm."""

CHECKS = (
    "metadata",
    "files",
    "tables",
    "codecs",
    "commits",
    "data",
    "statistics",
    "features",
    "live",
)


@runtime_checkable
class Meter(Protocol):
    """Is told how far a check got; `stages.progress.Progress` is one."""

    def start(self, label: str, total: int) -> None:
        """Begin a task of `total` steps."""
        ...

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count steps as done."""
        ...


class NoMeter:
    """Shows nothing."""

    def start(self, label: str, total: int) -> None:
        """Ignore the task."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Ignore the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, where it is, and the command that mends it."""

    severity: Severity
    check: str
    what: str
    mend: str = ""
    teacher: str | None = None
    level: str | None = None
    shard: int | None = None
    row: int | None = None
    image: str | None = None

    def where(self) -> str:
        """Return the place in words, "store" where it is no teacher's."""
        parts = [self.teacher or "store", self.level]
        parts += [
            f"{name} {value}"
            for name, value in (("shard", self.shard), ("row", self.row), ("image", self.image))
            if value is not None
        ]
        return ", ".join(part for part in parts if part)


@dataclass(slots=True, kw_only=True)
class Verification:
    """The findings, the checks that were made (`store` or a teacher's name, check), and numbers.

    `seconds` is the whole check's; `bytes_read` are those of the shard files that were hashed.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)
    performed: set[tuple[str, str]] = field(default_factory=set)
    numbers: list[FeatureNumbers] = field(default_factory=list)
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether there is nothing but remarks."""
        return all(finding.severity == "remark" for finding in self.findings)

    def add(self, severity: Severity, check: str, what: str, mend: str = "", **where: Any) -> None:
        """Note a finding; `where` are the fields of `Finding` that say it."""
        self.findings.append(Finding(severity=severity, check=check, what=what, mend=mend, **where))

    def count(self, scope: str, check: str) -> int:
        """Return how many findings other than remarks a check made in a scope."""
        return sum(
            finding.check == check
            and (finding.teacher or "store") == scope
            and finding.severity != "remark"
            for finding in self.findings
        )

    def scopes(self) -> Sequence[str]:
        """Return "store", then the teachers that were looked at."""
        return ["store", *sorted({scope for scope, _ in self.performed} - {"store"})]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "path": self.path,
            "clean": self.clean,
            "checks": {
                scope: {
                    check: self.count(scope, check)
                    for check in CHECKS
                    if (scope, check) in self.performed
                }
                for scope in self.scopes()
            },
            "findings": [asdict(finding) for finding in self.findings],
            "features": [asdict(numbers) for numbers in self.numbers],
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
