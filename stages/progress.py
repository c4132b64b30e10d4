"""The seam through which a stage reports progress without knowing who shows it."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives what a long job has done; the console draws it, tests ignore it."""

    def start(self, label: str, total: int) -> None:
        """Begin a task of `total` steps; a second call replaces the first task."""
        ...

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count steps as done; `note` is a short text such as the current loss."""
        ...


class NoProgress:
    """Shows nothing."""

    def start(self, label: str, total: int) -> None:
        """Ignore the task."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Ignore the steps."""
