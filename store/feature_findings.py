"""What the numbers of an audit mean: which are findings, which are only remarks.

Outliers, massive activations and single dead channels are normal in good teachers (DINOv2 has all
three), so they are remarks and fail no gate; what no good teacher does is a finding.
"""

from collections.abc import Iterable

from store.audit import FeatureNumbers
from store.findings import Severity, Verification
from store.reader import FeatureStore

_SHOWN = 5
_DEAD_SHARE = 0.1
_PEAK = 100.0  # of the root mean square; Sun et al. 2024 call activations massive from there on
_TOP_SHARE = 0.5


def note_numbers(numbers: FeatureNumbers, store: FeatureStore, found: Verification) -> None:
    """Note what is wrong or remarkable in the numbers of a level."""
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
        note(
            "suspect", f"{numbers.saturated} values are at the limit of the stored type",
            "leave the level out, or store it with a wider codec",
        )  # fmt: skip
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
