"""Tells a reader that its store has grown since it was opened, rather than of damage."""

from collections.abc import Iterator
from contextlib import contextmanager

from store.errors import StoreDamagedError, StoreMismatchError
from store.remote import StorePath
from store.tables import RootRecord, read_root
from store.teacher import TeacherRecord, read_record


def refuse_grown(path: StorePath, opened: RootRecord | TeacherRecord) -> None:
    """Refuse to go on when a store or a teacher is no longer what was opened.

    Raises:
        StoreMismatchError: it has changed.
    """
    now = read_root(path) if isinstance(opened, RootRecord) else read_record(path)
    if now != opened:
        raise StoreMismatchError(
            f"{path} has changed since it was opened, as it does when images are added; "
            "open it again, after `sak extract-teachers`"
        )


@contextmanager
def growth_told(path: StorePath, opened: RootRecord | TeacherRecord) -> Iterator[None]:
    """Files that another process made longer meanwhile look damaged, but are not.

    Raises:
        StoreMismatchError: instead of `StoreDamagedError`, where that is the reason.
    """
    try:
        yield
    except StoreDamagedError:
        refuse_grown(path, opened)
        raise
