"""The checks that read no features: metadata documents, tables, and files that do not belong."""

from collections.abc import Mapping
from typing import Any

from store.documents import check_document, encode_document, load_document
from store.errors import StoreDamagedError, StoreError
from store.figures import FigureTable
from store.files import names_below, read_file
from store.findings import Verification
from store.images import ImageTable
from store.layout import METADATA, ArrayLayout, group_document
from store.measured import MEASURED
from store.remote import StorePath
from store.tables import RootRecord, read_images, read_root, read_views, table_layouts
from store.teacher import TeacherRecord, is_earlier, is_teacher, read_record
from store.teacher_layout import TeacherLayout, codec_layouts

_CONSOLIDATED = "consolidated_metadata"
_TABLES = ("images", "views")


def check_root(path: StorePath, found: Verification) -> tuple[RootRecord | None, ImageTable | None]:
    """Check the root and its tables; return what could be read of them.

    Raises:
        StoreError: there is no store at all, or one of another format or version.
    """
    mend = (
        f"delete {METADATA}, images and views in {path} (not the teachers) and run `sak index`: "
        "with the same images it writes the same tables"
    )
    found.performed |= {("store", check) for check in ("metadata", "files", "tables")}
    try:
        root = read_root(path)
    except StoreDamagedError as error:
        found.add("damage", "metadata", str(error), mend)
        return None, None
    images = None
    try:
        images = read_images(path)
    except StoreError as error:
        found.add("damage", "tables", str(error), mend)
    try:
        read_views(path)
    except StoreError as error:
        found.add("damage", "tables", str(error), mend)
        return root, None  # nothing confirms how many rows there are
    for name in _TABLES:
        _check_bytes(path / name / METADATA, group_document({}), found, mend)
    if images is not None:
        layouts = table_layouts(images, root.rows, photometric=root.photometric)
        for layout in layouts:
            _check_bytes(path / layout.path / METADATA, layout.document(), found, mend)
        _check_tables_files(path, layouts, found)
    return root, images


def check_root_document(
    path: StorePath,
    root: RootRecord,
    below: Mapping[str, dict[str, Any]] | None,
    found: Verification,
) -> None:
    """Check the root's own document; `below` is every document that consolidation would copy.

    Copies are not compared where `below` is None: not all of those documents are known.
    """
    mend = f"delete {METADATA}, images and views in {path} (not the teachers) and run `sak index`"
    expected = group_document(root.to_attributes())
    document = load_document(path / METADATA)
    if _CONSOLIDATED not in document:
        _check_bytes(path / METADATA, expected, found, mend)
        return
    consolidated = document[_CONSOLIDATED]
    try:
        check_document(path / METADATA, {**expected, _CONSOLIDATED: consolidated})
    except StoreDamagedError as error:
        found.add("damage", "metadata", str(error), mend)
    if below is not None:
        _check_copies(path, consolidated, below, found)


def _check_copies(
    path: StorePath, consolidated: object, below: Mapping[str, dict[str, Any]], found: Verification
) -> None:
    copies = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    copies = copies if isinstance(copies, dict) else {}
    known = {name.removesuffix(f"/{METADATA}"): text for name, text in below.items()}
    stale = [name for name, text in known.items() if not _says(copies.get(name), text)]
    stale += [name for name in copies if name not in known]
    if not stale:
        found.add("remark", "metadata", "another tool added consolidated metadata to the root")
        return
    found.add(
        "suspect", "metadata",
        f"the consolidated metadata at the root is stale for {len(stale)} groups or arrays, such "
        f"as {stale[0]!r}: tools that believe it miss them or read them wrongly",
        f"python -c \"import zarr; zarr.consolidate_metadata('{path}')\"",
    )  # fmt: skip


def _check_stranger(
    folder: StorePath, record: TeacherRecord, again: str, found: Verification
) -> None:
    name = folder.name
    try:
        earlier = is_earlier(folder.parent, record)
    except StoreDamagedError:
        what = "it was not checked further: the store's tables must be mended first"
        found.add("remark", "metadata", what, teacher=name)
        return
    if earlier:
        what = "it is not finished: images were added since, or taken out of quarantine"
        mend = f"`sak extract-teachers {name}` computes what is missing"
        found.add("remark", "commits", what, mend, teacher=name)
        return
    what = f"it was extracted for other images or views than {folder.parent} now lists"
    found.add("damage", "metadata", what, again, teacher=name)


def check_description(
    folder: StorePath, root: RootRecord | None, found: Verification
) -> TeacherRecord | None:
    """Check a teacher's own description and return it, or None where nothing can be believed.

    How many rows there are is believed only where the root says the same.
    """
    name = folder.name
    again = f"delete {folder} and run `sak extract-teachers {name}`"
    found.performed |= {(name, "metadata"), (name, "files")}
    try:
        record = read_record(folder)
    except StoreError as error:
        found.add("damage", "metadata", str(error), again, teacher=name)
        return None
    if root is None:
        what = "it was not checked further: the store's root must be mended first"
        found.add("remark", "metadata", what, teacher=name)
        return None
    if not record.belongs_to(root):
        _check_stranger(folder, record, again, found)
        return None
    mend = f"`sak extract-teachers {name}` writes its metadata anew"
    _check_bytes(
        folder / METADATA, group_document(record.to_attributes()), found, mend, teacher=name
    )
    for path, document in record.layout.documents().items():
        _check_bytes(folder / path, document, found, mend, teacher=name)
    mend = f"`sak verify {folder.parent} --repair`, then `sak extract-teachers {name}`"
    for path, document in record.layout.statistics_documents().items():
        if record.finished or (folder / path).exists():
            _check_bytes(folder / path, document, found, mend, teacher=name)
    for table in MEASURED:
        if table.exists(folder):
            _check_figures(folder, table, record, found)
    return record


def _check_figures(
    folder: StorePath, table: FigureTable, record: TeacherRecord, found: Verification
) -> None:
    name = folder.name
    mend = f"delete {folder / table.folder}: it only holds {table.says}"
    for path, document in table.documents(record.spec).items():
        _check_bytes(folder / path, document, found, mend, teacher=name)
    try:
        table.read(folder, record.spec)
    except StoreDamagedError as error:
        found.add("damage", "metadata", str(error), mend, teacher=name)


def documents_below(
    path: StorePath, records: Mapping[str, TeacherRecord], tables: list[ArrayLayout]
) -> dict[str, dict[str, Any]]:
    """Return every metadata document of a store but the root's, by path below the root."""
    documents = {f"{name}/{METADATA}": group_document({}) for name in _TABLES}
    documents |= {f"{layout.path}/{METADATA}": layout.document() for layout in tables}
    for name, record in records.items():
        layout = record.layout
        documents[f"{name}/{METADATA}"] = group_document(record.to_attributes())
        below = layout.documents() | (layout.statistics_documents() if record.finished else {})
        for table in MEASURED:
            if table.exists(path / name):
                below |= table.documents(record.spec)
        documents |= {f"{name}/{path}": text for path, text in below.items()}
    return documents


def teacher_folders(path: StorePath, found: Verification) -> list[StorePath]:
    """Return the folders of teachers, and note what else lies in the store."""
    folders = []
    entries: list[StorePath] = [*path.iterdir()]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name in (*_TABLES, METADATA) or entry.name.startswith("."):
            _note_partial(entry, found)
            continue
        try:
            teacher = entry.is_dir() and is_teacher(entry)
        except StoreDamagedError:  # its description cannot even be parsed
            teacher = True
        if teacher:
            folders.append(entry)
            continue
        kind = "folder" if entry.is_dir() else "file"
        found.add(
            "damage" if (entry / "valid").is_dir() else "suspect", "files",
            f"{entry} is no part of the store" if kind == "file" or not (entry / "valid").is_dir()
            else f"{entry} looks like a teacher, but its {METADATA} does not say so",
            f"look at it; if it is not needed, delete the {kind}",
        )  # fmt: skip
    return folders


def check_teacher_files(folder: StorePath, layout: TeacherLayout, found: Verification) -> None:
    """Note files below a teacher that the format does not know."""
    arrays = [*layout.features().values(), layout.valid(), *layout.commits()]
    for target in layout.spec.targets:
        arrays += layout.statistics(target).values()
        if target.name in layout.codecs:
            arrays += codec_layouts(target, layout.codecs[target.name]).values()
    known = {METADATA, *layout.documents(), *layout.statistics_documents(), *_chunk_files(arrays)}
    for table in MEASURED:
        if table.exists(folder):
            known |= table.documents(layout.spec).keys()
            known |= _chunk_files(list(table.layouts(layout.spec).values()))
    _check_unknown(folder, "", known, found, teacher=folder.name)


def _check_tables_files(path: StorePath, layouts: list[ArrayLayout], found: Verification) -> None:
    known = {f"{name}/{METADATA}" for name in _TABLES}
    known |= {f"{layout.path}/{METADATA}" for layout in layouts} | _chunk_files(layouts)
    for name in _TABLES:
        _check_unknown(path / name, f"{name}/", known, found)


def _chunk_files(arrays: list[ArrayLayout]) -> set[str]:
    return {array.file_path(number) for array in arrays for number in range(array.files)}


def _check_unknown(
    folder: StorePath, before: str, known: set[str], found: Verification, **where: Any
) -> None:
    for name in names_below(folder):
        if name.rpartition("/")[2].startswith("."):
            _note_partial(folder / name, found, **where)
        elif before + name not in known:
            found.add(
                "suspect", "files", f"{folder / name} is no part of the store",
                "look at it; if it is not needed, delete the file", **where,
            )  # fmt: skip


def _note_partial(file: StorePath, found: Verification, **where: Any) -> None:
    if file.name.startswith(".") and file.name.endswith(".partial"):
        found.add(
            "remark", "files", f"{file} was left by a writer that was killed (or is at work now)",
            "`sak gc` removes it", **where,
        )  # fmt: skip


def _check_bytes(
    path: StorePath, expected: dict[str, Any], found: Verification, mend: str, **where: Any
) -> None:
    """Compare a document's bytes: there is one way to write it, and so no flip goes unseen."""
    try:
        if path.exists() and read_file(path) == encode_document(expected):
            return
        check_document(path, expected)
    except StoreDamagedError as error:
        found.add("damage", "metadata", str(error), mend, **where)
        return
    found.add(
        "suspect", "metadata",
        f"{path} says what it should, but not in the bytes that were written: it was edited, "
        "rewritten by another tool, or damaged where it does not show",
        mend, **where,
    )  # fmt: skip


def _says(copy: object, document: dict[str, Any]) -> bool:
    """Whether a consolidated copy says what the document does; tools add keys of their own."""
    return isinstance(copy, dict) and _plain({**copy, **document}) == _plain(copy)


def _plain(value: Any) -> Any:
    """Leave out the byte order, which zarr drops from arrays of single bytes when it copies."""
    if value == {"name": "bytes", "configuration": {"endian": "little"}}:
        return {"name": "bytes"}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
