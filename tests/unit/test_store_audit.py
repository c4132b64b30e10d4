"""Numbers of an audit against features whose faults are known, and which of them are findings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.audit import FeatureNumbers, LevelAudit, centre_of, robust_z, saturated
from store.create import create_store
from store.findings import Finding
from store.images import ImageTable
from store.reader import FeatureStore
from store.spec import LevelSpec, TeacherSpec
from store.testing import sample_images, sample_views
from store.verify import verify
from store.writer import FeatureWriter

ROWS = 40
GRID = (4, 5)
CHANNELS = 12


def usual(dtype: str = "float32") -> np.ndarray:
    generator = np.random.default_rng(0)
    means = generator.normal(0, 2, CHANNELS)
    return generator.normal(means, 1, (ROWS, *GRID, CHANNELS)).astype(dtype)


def audit(values: np.ndarray, batch: int = 7, stored: np.ndarray | None = None) -> FeatureNumbers:
    level = LevelAudit("teacher", "level", centre_of(values))
    for start in range(0, len(values), batch):
        rows = np.arange(start, min(start + batch, len(values)))
        level.add(rows, values[rows], None if stored is None else stored[rows])
    return level.numbers()


def test_usual_features_are_unremarkable() -> None:
    numbers = audit(usual())
    assert (numbers.rows, numbers.channels) == (ROWS, CHANNELS)
    assert numbers.rms == pytest.approx(np.sqrt((usual() ** 2).mean()), rel=1e-6)
    assert numbers.peak == pytest.approx(np.abs(usual()).max() / numbers.rms, rel=1e-6)
    energy = (usual() ** 2).sum(axis=(0, 1, 2))
    assert numbers.top_share == pytest.approx(energy.max() / energy.sum(), rel=1e-6)
    assert (numbers.non_finite, numbers.saturated, numbers.outliers) == (0, 0, 0)
    assert numbers.dead_channels == numbers.zero_rows == numbers.duplicates == ()
    assert numbers.megabytes_per_second > 0


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, ROWS + 1), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_numbers_do_not_depend_on_batches(batch: int, dtype: str) -> None:
    values = usual(dtype)
    values[3, 0, 0, 0] = np.nan
    values[5] = values[4]
    values[..., 2] = 1
    one, other = audit(values, ROWS), audit(values, batch)
    assert one.rms == pytest.approx(other.rms, rel=1e-6)
    for name in ("non_finite_rows", "dead_channels", "duplicates", "peak_channel", "zero_rows"):
        assert getattr(one, name) == getattr(other, name)
    assert one.non_finite_rows == (3,)
    assert one.dead_channels == (2,)
    assert one.duplicates == ((4, 5),)


def test_nan_and_infinity_are_counted_and_spoil_no_other_number() -> None:
    values = usual()
    values[3, 1, 2] = np.nan
    values[17, 0, 0, 4] = -np.inf
    numbers = audit(values)
    assert numbers.non_finite == CHANNELS + 1
    assert numbers.non_finite_rows == (3, 17)
    assert numbers.rms == pytest.approx(audit(usual()).rms, rel=1e-2)
    assert np.isfinite([numbers.peak, numbers.top_share]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([65504, -65504, 65472, 0], np.float16), 2),
        (np.array([65504, np.finfo(np.float32).max], np.float32), 1),
        (np.array([127, -127, -128, 126, 0], np.int8), 3),
        (np.array([0, 255], np.uint8), 0),  # packed codes
    ],
)
def test_saturation_is_judged_by_the_type(values: np.ndarray, expected: int) -> None:
    assert saturated(values) == expected


def test_saturated_codes_are_counted_beside_decoded_values() -> None:
    codes = np.zeros((ROWS, *GRID, CHANNELS), np.int8)
    codes[2, 0, 0, :3] = 127
    assert audit(usual(), stored=codes).saturated == 3


def test_massive_activations_are_measured() -> None:
    values = usual("float16")
    values[:, 0, 0, 7] = 3000
    numbers = audit(values)
    assert numbers.peak_channel == 7
    assert numbers.peak == pytest.approx(3000 / numbers.rms)
    assert numbers.top_share > 0.99


def test_a_row_of_another_kind_is_an_outlier() -> None:
    values = usual()
    values[11] *= 30
    values[23] = -values[23]
    numbers = audit(values)
    assert [odd.row for odd in numbers.odd_rows] == [11, 23] or [
        odd.row for odd in numbers.odd_rows
    ] == [23, 11]
    by_row = {odd.row: odd for odd in numbers.odd_rows}
    assert by_row[11].norm_z > 100
    assert by_row[23].cosine_z < -100
    assert numbers.outliers == 2


def test_robust_z_is_that_of_a_normal_law_and_survives_equal_values() -> None:
    values = np.random.default_rng(0).normal(5, 3, 20_000)
    np.testing.assert_allclose(robust_z(values), (values - 5) / 3, atol=0.1)
    assert not robust_z(np.full(20, 2.5)).any()
    mostly = np.array([1.0] * 19 + [9.0])
    assert robust_z(mostly)[-1] > 10


def test_pooled_outputs_have_one_token() -> None:
    numbers = audit(usual()[:, 0, 0])
    assert numbers.channels == CHANNELS
    assert numbers.dead_channels == ()
    assert audit(usual()[:1, 0, 0]).dead_channels == ()  # one token says nothing


LEVEL = LevelSpec(name="level", grid=GRID, channels=CHANNELS)
SPEC = TeacherSpec(name="teacher", levels=(LEVEL,), provenance={})


def findings(path: Path, values: np.ndarray, images: ImageTable | None = None) -> list[Finding]:
    create_store(path, images or sample_images(ROWS), sample_views(ROWS))
    with FeatureWriter.open(path, SPEC) as writer:
        writer.write(range(ROWS), {"level": values}, None, np.ones(ROWS, bool))
        writer.finish()
    found = verify(path)
    assert [(one.teacher, one.level) for one in found.numbers] == [("teacher", "level/native")]
    assert all(entry.check == "features" for entry in found.findings)
    return found.findings


def test_zero_rows_and_saturation_are_findings(tmp_path: Path) -> None:
    values = usual()
    values[6] = 0
    values[8, 0, 0, 0] = 65504
    found = [entry for entry in findings(tmp_path, values) if entry.severity == "suspect"]
    assert [(entry.row, entry.image) for entry in found] == [(6, "room/0006-é"), (None, None)]
    assert "all zeros" in found[0].what
    assert f"1 of {values.size} values are at the limit" in found[1].what


def test_equal_features_of_different_images_are_a_finding(tmp_path: Path) -> None:
    values = usual()
    values[9] = values[5]
    found = findings(tmp_path / "other", values)
    assert [(entry.severity, entry.row) for entry in found] == [("suspect", 5)]
    assert "2 rows are equal to the byte: rows 5, 9, of different image files" in found[0].what
    images = sample_images(ROWS)
    digests = tuple(images.sha256[5 if row == 9 else row] for row in range(ROWS))
    same = ImageTable(
        ids=images.ids,
        sha256=digests,
        heights=images.heights,
        widths=images.widths,
        statuses=images.statuses,
    )
    assert [entry.severity for entry in findings(tmp_path / "same", values, same)] == ["remark"]


@pytest.mark.parametrize(("dead", "severity"), [(1, "remark"), (4, "suspect")])
def test_many_dead_channels_are_a_finding(tmp_path: Path, dead: int, severity: str) -> None:
    values = usual()
    values[..., :dead] = 0.5
    found = findings(tmp_path, values)
    assert [entry.severity for entry in found] == [severity]
    assert f"{dead} of {CHANNELS} channels never change: 0" in found[0].what


def test_what_good_teachers_do_is_a_remark(tmp_path: Path) -> None:
    values = usual()
    values[:, 0, 0, 7] = 3000
    values[11] = -values[11]
    found = findings(tmp_path, values)
    assert {entry.severity for entry in found} == {"remark"}
    assert any("massive activations: channel 7" in entry.what for entry in found)
    assert any(entry.row == 11 and "far from the other rows" in entry.what for entry in found)


def test_nan_in_decoded_features_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer refuses NaN, so a faulty decoder is made up."""
    real = FeatureStore.read_codes

    def read(self: FeatureStore, teacher: str, level: str, rows: np.ndarray, grid: Any) -> Any:
        values = real(self, teacher, level, rows, grid)
        values[np.asarray(rows) == 4, 0, 0] = np.nan
        return values

    monkeypatch.setattr(FeatureStore, "read_codes", read)
    found = [entry for entry in findings(tmp_path, usual()) if entry.severity == "suspect"]
    assert [(entry.row, entry.what) for entry in found] == [(4, "the row holds NaN or infinity")]
