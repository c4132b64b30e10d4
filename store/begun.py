"""Room that shards still take which are being written now, by any writer on any teacher."""

from pathlib import Path

from store.files import partial_path
from store.locks import held_shards
from store.teacher import is_teacher, read_record
from store.teacher_layout import TeacherLayout


def bytes_to_come(store: Path, folder: Path, shard: int) -> int:
    """Return the bytes that begun shards of a local store lack, but for this one of a teacher.

    Begun is a shard that some writer holds and has opened files for; those of killed writers count
    for nothing. Between this look and the first byte another writer may look too.
    """
    total = 0
    for teacher in sorted(path for path in store.iterdir() if path.is_dir() and is_teacher(path)):
        held = [one for one in held_shards(teacher) if (teacher, one) != (folder, shard)]
        if held:
            layout = read_record(teacher).layout
            total += sum(_lacking(teacher, layout, one) for one in held)
    return total


def _lacking(folder: Path, layout: TeacherLayout, shard: int) -> int:
    if shard >= layout.shards:
        return 0
    lacking = 0
    for array in layout.features().values():
        try:
            found = partial_path(folder / array.file_path(shard)).stat().st_size
        except FileNotFoundError:  # not begun, or complete and in its place
            continue
        lacking += max(0, array.file_bytes(shard) - found)
    return lacking
