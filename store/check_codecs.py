"""The check of what decodes the features: a codec's arrays against the digest of the teacher."""

from store.codecs import FLOATS, Codec, FloatCodec
from store.errors import StoreDamagedError, StoreError
from store.findings import Verification
from store.remote import StorePath
from store.spec import GLOBAL
from store.stored_codecs import read_codec
from store.teacher import TeacherRecord


def check_codecs(folder: StorePath, record: TeacherRecord, found: Verification) -> dict[str, Codec]:
    """Return the codec of every array of a teacher whose codec is sound; note the others."""
    spec = record.spec
    if record.codecs:
        found.performed.add((folder.name, "codecs"))
    floats = FloatCodec(dtype=FLOATS.get(spec.codec, "<f2"))
    codecs: dict[str, Codec] = {}
    for target in spec.targets:
        stored = record.codecs.get(target.name)
        try:
            if stored is not None and stored.name != spec.codec:
                raise StoreDamagedError(
                    f"{folder} says that its codec is {spec.codec}, and that of {target.name} is "
                    f"{stored.name}"
                )
            codecs[target.name] = (
                floats if stored is None else read_codec(folder, target, stored).codec
            )
        except StoreError as error:
            found.add(
                "damage", "codecs", str(error),
                f"its features cannot be decoded: delete {folder} and run "
                f"`sak extract-teachers {folder.name}`",
                teacher=folder.name, level=target.name,
            )  # fmt: skip
    if spec.global_channels is not None:
        codecs[GLOBAL] = floats
    return codecs
