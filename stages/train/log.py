"""`log.csv` of a run: one row per window of steps, safe to continue after a crash."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stages.train.files import write_atomically

Tracker = Callable[[Mapping[str, float]], None]
"""Takes a row of the log; `step` is one of its columns."""


class TrainingLog:
    """Appends rows to a CSV file whose columns are fixed by its first row.

    Opening it at a step drops the rows of later steps, and a row cut short by a crash.
    """

    def __init__(self, path: Path | None, resumed_step: int) -> None:
        """Open the log at a step; without a path it only remembers its newest row."""
        self._path = path
        self.trackers: Sequence[Tracker] = ()
        """Who gets each new row as well."""
        rows = [] if path is None else _rows_until(path, resumed_step)
        if path is not None:
            text = io.StringIO()
            csv.writer(text).writerows(rows)
            write_atomically(path, lambda temporary: _write_text(temporary, text.getvalue()))
        self._columns = rows[0] if rows else []
        self.past = [dict(zip(rows[0], map(float, row), strict=True)) for row in rows[1:]]
        """Rows of earlier processes."""
        self.last: dict[str, float] = self.past[-1] if self.past else {}
        """The newest row; empty before the first."""

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; the first one decides the columns."""
        self._columns = self._columns or list(row)
        if self._path is not None:
            with self._path.open("a", newline="") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(self._columns)
                writer.writerow([f"{row[column]:.9g}" for column in self._columns])
        for tracker in self.trackers:
            tracker(row)
        self.last = dict(row)


def _rows_until(path: Path, step: int) -> list[list[str]]:
    if step == 0 or not path.is_file():
        return []
    whole_lines = path.read_text().rpartition("\n")[0].splitlines()
    header, *rows = list(csv.reader(whole_lines)) or [[]]
    return [header, *(row for row in rows if int(row[0]) <= step)]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, newline="")
