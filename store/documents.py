"""Metadata files: placed atomically, and compared with what they must say before being believed."""

import json
from typing import Any

from store.errors import StoreDamagedError, StoreFormatError
from store.files import read_file, write_file
from store.layout import group_document
from store.remote import StorePath
from store.spec import FORMAT, FORMAT_VERSION


def encode_document(document: dict[str, Any]) -> bytes:
    """Return the bytes of a metadata file."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load_document(path: StorePath) -> dict[str, Any]:
    """Return the content of a metadata file.

    Raises:
        StoreDamagedError: the file is missing or no JSON object.
    """
    try:
        document = json.loads(read_file(path))
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path} is missing from the store") from error
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8
        raise StoreDamagedError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreDamagedError(f"{path} should hold a JSON object, got {document!r:.80}")
    return document


def write_document(path: StorePath, document: dict[str, Any]) -> None:
    """Place a metadata file, unless it already says just that."""
    data = encode_document(document)
    try:
        there = read_file(path) == data
    except FileNotFoundError:
        there = False
    if not there:
        write_file(path, data)


def check_document(path: StorePath, expected: dict[str, Any]) -> None:
    """Refuse metadata that is not the only document this format allows there.

    Raises:
        StoreDamagedError: the file is missing or says something else.
    """
    refuse_difference(path, load_document(path), expected)


def refuse_difference(path: StorePath, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse metadata that says something else than expected.

    Raises:
        StoreDamagedError: with what differs.
    """
    wrong = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if wrong:
        detail = ", ".join(
            f"{key} {found.get(key)!r:.80} instead of {expected.get(key)!r:.80}" for key in wrong
        )
        raise StoreDamagedError(f"{path} does not agree with the store's own description: {detail}")


def read_attributes(path: StorePath) -> dict[str, Any]:
    """Return the attributes of a group that must be of this format and version.

    Raises:
        StoreDamagedError: the metadata is missing or unreadable.
        StoreFormatError: it is of another format, or of a version this release does not know.
    """
    document = load_document(path)
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise StoreFormatError(f"{path} is not of a feature store; choose another path")
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise StoreFormatError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            + (
                "run `sak index` and `sak extract-teachers` with another store path"
                if older
                else "upgrade sak-distill (`pip install --upgrade sak-distill`)"
            )
        )
    # Zarr's tools may add consolidated metadata at the root, so only these keys are compared.
    if {**document, **group_document(attributes)} != document:
        raise StoreDamagedError(f"{path} is not the metadata of a Zarr v3 group")
    return attributes


def read_count(attributes: dict[str, Any], key: str) -> int:
    """Return an attribute that must be a whole number of at least 1.

    Raises:
        StoreDamagedError: it is anything else.
    """
    value = attributes.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StoreDamagedError(f"{key} must be a whole number of at least 1, got {value!r}")
    return value
