"""View tables with colours: kept whole, covered by digests, refused when tampered with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from store.admit import admit_images
from store.append import append_images
from store.create import create_store
from store.errors import StoreDamagedError, StoreError, StoreMismatchError
from store.images import ViewTable
from store.inspect import summarise
from store.reader import FeatureStore
from store.testing import (
    refuse_every_flip,
    sample_images,
    sample_teacher,
    sample_views,
    write_rows,
)
from store.verify import verify
from store.writer import FeatureWriter

ROWS = 6


def coloured(rows: int = ROWS, views_per_image: int = 2) -> ViewTable:
    factors = np.random.default_rng(0).uniform(0.5, 1.5, (rows, 4))
    flips = np.arange(rows) % 3 == 1
    return replace(sample_views(rows, views_per_image), photometric=factors, flips=flips)


def edit_root(path: Path, **changes: Any) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] |= changes
    gone = [key for key, value in document["attributes"].items() if value is None]
    for key in gone:
        del document["attributes"][key]
    (path / "zarr.json").write_text(json.dumps(document))


def test_colours_come_back_and_any_reader_opens_them(tmp_path: Path) -> None:
    views = coloured()
    create_store(tmp_path / "store", sample_images(3), views)
    store = FeatureStore(tmp_path / "store")
    assert store.views == views
    np.testing.assert_array_equal(store.views.photometric, views.photometric)
    array = zarr.open_array(tmp_path / "store" / "views" / "photometric", mode="r")
    np.testing.assert_array_equal(array[:], views.photometric)
    assert array.metadata.dimension_names == ("row", "factor")
    assert verify(tmp_path / "store").clean
    summary = summarise(tmp_path / "store")
    assert (summary.views_per_image, summary.flipped, summary.photometric) == (2, 2, True)


def test_stores_without_colours_are_what_they_were(tmp_path: Path) -> None:
    create_store(tmp_path / "store", sample_images(3), sample_views(3))
    assert "photometric" not in (tmp_path / "store" / "zarr.json").read_text()
    assert not (tmp_path / "store" / "views" / "photometric").exists()
    assert FeatureStore(tmp_path / "store").views.photometric is None


def test_the_digest_covers_every_factor() -> None:
    views = coloured()
    assert views.photometric is not None
    others = {replace(views, photometric=None).digest(), views.digest()}
    for row in range(ROWS):
        for column in range(4):
            changed = np.array(views.photometric)
            changed[row, column] += 1e-3
            others.add(replace(views, photometric=changed).digest())
    assert len(others) == 2 + 4 * ROWS
    assert views.first(4).photometric is not None
    np.testing.assert_array_equal(views.first(4).photometric, views.photometric[:4])
    some = views.of_images([2, 0])
    assert some.views_per_image == 2
    np.testing.assert_array_equal(some.photometric, views.photometric[[4, 5, 0, 1]])
    np.testing.assert_array_equal(some.seeds, views.seeds[[4, 5, 0, 1]])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones((ROWS, 3)), r"photometric must be \(6, 4\)"),
        (np.full((ROWS, 4), np.nan), "finite"),
        (np.full((ROWS, 4), -0.1), "at least 0"),
    ],
)
def test_impossible_factors_are_refused(factors: np.ndarray, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        replace(sample_views(ROWS), photometric=factors)


@pytest.mark.parametrize("value", [None, False, 1, "yes", [True]])
def test_a_root_that_lies_about_colours_is_refused(tmp_path: Path, value: object) -> None:
    create_store(tmp_path, sample_images(3), coloured())
    edit_root(tmp_path, photometric=value)
    with pytest.raises(StoreDamagedError):
        _ = FeatureStore(tmp_path).views
    assert not verify(tmp_path).clean


def test_a_root_that_claims_colours_it_has_not_is_refused(tmp_path: Path) -> None:
    create_store(tmp_path, sample_images(3), sample_views(3))
    edit_root(tmp_path, photometric=True)
    with pytest.raises(StoreDamagedError, match="photometric"):
        _ = FeatureStore(tmp_path).views


def test_factors_that_no_view_has_are_damage(tmp_path: Path) -> None:
    """With sound checksums: somebody wrote them with a Zarr library."""
    create_store(tmp_path, sample_images(3), coloured())
    array = zarr.open_array(tmp_path / "views" / "photometric", mode="r+")
    array[0, 0] = np.inf
    with pytest.raises(StoreDamagedError, match="finite"):
        _ = FeatureStore(tmp_path).views
    array[0, 0] = 0.75
    with pytest.raises(StoreDamagedError, match="digest"):
        _ = FeatureStore(tmp_path).views


def test_no_flipped_bit_of_the_tables_goes_unseen(tmp_path: Path) -> None:
    spec = sample_teacher(global_channels=None)
    create_store(tmp_path, sample_images(3), coloured())
    with FeatureWriter.open(tmp_path, spec, 2**20) as writer:
        for rows in writer.missing():
            write_rows(writer, spec, rows)
        writer.finish()
    flipped = refuse_every_flip(tmp_path, tmp_path / "views", per_file=3)
    assert "views/photometric/c.0.0" in flipped


def test_a_store_grows_with_its_colours(tmp_path: Path) -> None:
    views = coloured(8)
    create_store(tmp_path, sample_images(3), views.first(6))
    append_images(tmp_path, sample_images(4), views)
    assert FeatureStore(tmp_path).views == views
    with pytest.raises(StoreMismatchError, match=r"photometric: store has True"):
        append_images(tmp_path, sample_images(5), replace(sample_views(10, 2)))


def test_admitting_an_image_may_change_no_colours_of_others(tmp_path: Path) -> None:
    views = coloured()
    assert views.photometric is not None
    create_store(tmp_path, sample_images(3, quarantined=[2]), views)
    changed = np.array(views.photometric)
    changed[1, 0] += 0.25
    with pytest.raises(StoreError, match="not quarantined differ"):
        admit_images(tmp_path, sample_images(3), replace(views, photometric=changed))
    changed = np.array(views.photometric)
    changed[5, 0] += 0.25  # of the image that is admitted
    admit_images(tmp_path, sample_images(3), replace(views, photometric=changed))
    np.testing.assert_array_equal(FeatureStore(tmp_path).views.photometric, changed.astype("f4"))
