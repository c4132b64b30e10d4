"""What can go wrong with a feature store, and how a message names the nearest valid choice."""

import difflib
from collections.abc import Collection


class StoreError(ValueError):
    """Something is wrong with a feature store or with what was asked of it."""


class StoreMismatchError(StoreError):
    """The store holds something else than what is asked for; of `teacher`, where it is one's."""

    def __init__(self, message: str, teacher: str | None = None) -> None:
        super().__init__(message)
        self.teacher = teacher


class UnfinishedStoreError(StoreError):
    """The teacher has not been extracted for every row yet."""


class StoreLockedError(StoreError):
    """Another writer holds this teacher's folder."""


class StoreFormatError(StoreError):
    """The folder is no feature store, or one of another format version."""


class StoreDamagedError(StoreError):
    """A file of the store is missing, cut short or altered."""


def nearest(name: str, valid: Collection[str], limit: int = 2000) -> str:
    """Return a hint that names the valid choices nearest to `name`.

    More than `limit` choices are only counted: comparing with millions of image ids takes minutes.
    """
    if not valid:
        return "there are none"
    if len(valid) > limit:
        return f"{len(valid)} are known"
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    shown = ", ".join(repr(choice) for choice in sorted(valid)[:8])
    return f"known: {shown}" + (", ..." if len(valid) > 8 else "")


def difference(stored: object, asked: object, prefix: str = "") -> list[str]:
    """Return one line per value that differs between two JSON-like trees."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = [*stored, *(key for key in asked if key not in stored)]
        return [
            line
            for key in keys
            for line in difference(
                stored.get(key, "(absent)"), asked.get(key, "(absent)"), f"{prefix}{key}."
            )
        ]
    if stored == asked:
        return []
    return [f"  {prefix.rstrip('.')}: store has {stored!r}, asked for {asked!r}"]
