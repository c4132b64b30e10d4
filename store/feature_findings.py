"""What the numbers of an audit mean: which are findings, which are only remarks.

Outliers, massive activations and single dead channels are normal in good teachers (DINOv2 has all
three), so they are remarks and fail no gate; what no good teacher does is a finding.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from store.audit import FeatureNumbers, LevelAudit, centre_of
from store.codecs import Codes, Values
from store.decode import decode_rows
from store.findings import Severity, Verification
from store.reader import FeatureStore
from store.spec import Grid

_BATCH_BYTES = 2**23
_CENTRE_ROWS = 64
_SHOWN = 5
_DEAD_SHARE = 0.1
_PEAK = 100.0  # of the root mean square; Sun et al. 2024 call activations massive from there on
_TOP_SHARE = 0.5
_CLIPPED_SHARE = 0.01
"""Of int8 codes: a range fitted to few tokens leaves some outside. MobileNetV2 on other NYUv2 images:
0.3 % after 144 tokens, 0.08 % after 576, less than 0.01 % after 9,000. More is another teacher."""


def audit_target(
    store: FeatureStore,
    teacher: str,
    target: str,
    rows: NDArray[np.int64],
    found: Verification,
    advance: Callable[[int], None],
) -> None:
    """Note the numbers of `rows` (n,) of a level at one resolution, and what is odd about them.

    Raises:
        StoreDamagedError: a file changed since it was checked.
    """
    grids = {one.name: (one.level, one.grid) for one in store.teachers[teacher].targets}
    level, grid = grids.get(target, (target, None))
    spread = rows[:: max(1, len(rows) // _CENTRE_ROWS)]
    sample, _ = _read(store, teacher, level, spread, grid)
    audit = LevelAudit(teacher, target, centre_of(sample))
    batch = max(1, _BATCH_BYTES // sample[0].nbytes)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        values, codes = _read(store, teacher, level, part, grid)
        audit.add(part, values, codes)
        advance(len(part))
    numbers = audit.numbers()
    found.numbers.append(numbers)
    note_numbers(numbers, store, found, coded=codes.dtype.kind != "f")


def _read(
    store: FeatureStore, teacher: str, level: str, rows: NDArray[np.int64], grid: Grid | None
) -> tuple[Values, Codes]:
    """Return what readers get of rows, and what is stored of them, read once."""
    codes = store.read_codes(teacher, level, rows, grid)
    fitted = store.codec(teacher, level, grid)
    values = codes if fitted is None else decode_rows(fitted.codec, codes)
    return values, codes


def note_numbers(
    numbers: FeatureNumbers, store: FeatureStore, found: Verification, *, coded: bool
) -> None:
    """Note what is wrong or remarkable in the numbers of a target; `coded`: by a fitted codec."""
    place = {"teacher": numbers.teacher, "level": numbers.level}
    name = numbers.teacher
    ids = store.images.ids
    views = store.views.views_per_image

    def note(severity: Severity, what: str, mend: str = "", row: int | None = None) -> None:
        image = None if row is None else ids[row // views]
        found.add(severity, "features", what, mend, **place, row=row, image=image)

    anew = f"check the teacher, then `sak extract-teachers {name} --replace`"
    for row in numbers.non_finite_rows:
        note("suspect", "the row holds NaN or infinity", anew, row)
    for row in numbers.zero_rows:
        note("suspect", "the row is all zeros, but is marked valid", anew, row)
    if numbers.saturated:
        few = coded and numbers.saturated <= _CLIPPED_SHARE * numbers.stored_values
        note(
            "remark" if few else "suspect",
            f"{numbers.saturated} of {numbers.stored_values} values are at the limit of the stored "
            "type",
            "" if few else "leave the level out, or store it with a wider codec",
        )
    if numbers.dead_channels:
        share = len(numbers.dead_channels) / numbers.channels
        note(
            "suspect" if share > _DEAD_SHARE else "remark",
            f"{len(numbers.dead_channels)} of {numbers.channels} channels never change: "
            + _some(numbers.dead_channels),
            "check the teacher's weights and its input" if share > _DEAD_SHARE else "",
        )
    for group in numbers.duplicates:
        _note_duplicates(group, numbers, store, found)
    if numbers.peak > _PEAK or numbers.top_share > _TOP_SHARE:
        note(
            "remark",
            f"massive activations: channel {numbers.peak_channel} reaches {numbers.peak:.0f} x the "
            f"root mean square; the strongest channel has {numbers.top_share:.0%} of the energy",
        )
    for odd in numbers.odd_rows:
        note(
            "remark",
            f"far from the other rows (robust z of norm {odd.norm_z:+.1f}, of cosine "
            f"{odd.cosine_z:+.1f}; {numbers.outliers} such rows)",
            row=odd.row,
        )


def _note_duplicates(
    group: tuple[int, ...], numbers: FeatureNumbers, store: FeatureStore, found: Verification
) -> None:
    images, views = store.images, store.views.views_per_image
    files = {images.sha256[row // views] for row in group}
    same = len(files) == 1
    what = f"{len(group)} rows are equal to the byte: rows {_some(group)}"
    what += "; so are their image files" if same else ", of different image files"
    found.add(
        "remark" if same else "suspect", "features", what,
        "" if same else "look at the images; if they differ, run "
        f"`sak extract-teachers {numbers.teacher} --replace`",
        teacher=numbers.teacher, level=numbers.level, row=group[0],
        image=images.ids[group[0] // views],
    )  # fmt: skip


def _some(values: Iterable[int]) -> str:
    listed = list(values)
    return ", ".join(map(str, listed[:_SHOWN])) + (", ..." if len(listed) > _SHOWN else "")
