"""Progress bars, tables and messages: the only module that imports rich."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.report import Report

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or pipe."""

messages = Console(stderr=True, highlight=False)
"""Progress and remarks go to standard error, so that standard output holds results only."""


class BarProgress:
    """Draws `stages.progress.Progress` as one bar; silent when standard error is no terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, note="")

    def start(self, label: str, total: int) -> None:
        """Replace the bar by a new one of `total` steps."""
        self._bar.reset(self._task, total=total, description=label, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move the bar and show a short note at its end."""
        self._bar.update(self._task, advance=count, note=note)


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[BarProgress]:
    """One live bar with elapsed time and ETA, shown on a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    visible = enabled and messages.is_terminal
    with Progress(*columns, console=messages, transient=True, disable=not visible) as bar:
        yield BarProgress(bar)


def show(title: str, report: Report, as_json: bool) -> None:
    """Print a result on standard output: a table for people or one JSON object for machines."""
    output = _output()
    if as_json:
        show_json(report.data)
        return
    table = Table(title=title, title_justify="left")
    for column in report.columns:
        table.add_column(column, overflow="fold")
    for row in report.rows:
        table.add_row(*(cell(value) for value in row))
    output.print(table)
    for remark in report.remarks:
        output.print(remark, style="dim", markup=False, soft_wrap=True)


def _without_nan(value: object) -> object:
    """Say "nan", "inf" or "-inf" as text, for JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value


def show_json(data: object) -> None:
    """Print one JSON object on standard output."""
    _output().print_json(json.dumps(_without_nan(data), default=str, allow_nan=False))


def fail(message: str) -> None:
    """Print a user's mistake in red on standard error."""
    messages.print("error:", style="bold red", end=" ")
    messages.print(message, markup=False, soft_wrap=True)


def cell(value: object) -> str:
    """Text of one table cell: four digits, or a dash for nothing."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _output() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
