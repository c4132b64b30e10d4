"""A coded pyramid reads back as the codec says, for any rows, shards, batches and interruption."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.calibration import FittedTarget
from store.create import create_store
from store.errors import StoreError
from store.pyramid import area_average
from store.reader import FeatureStore
from store.spec import GLOBAL, TeacherSpec
from store.stored_codecs import describe_codec
from store.testing import (
    sample_codecs,
    sample_features,
    sample_images,
    sample_shard_bytes,
    sample_teacher,
    sample_views,
    write_rows,
)
from store.writer import FeatureWriter

CODECS = ["float16", "float32", "int8", "int8-pca", "int8-pca3", "pca-2bit", "pca-4bit"]


@lru_cache
def prepared(codec: str, first_row: int = 0) -> tuple[TeacherSpec, dict[str, FittedTarget]]:
    spec = sample_teacher(codec=codec, pyramid=True)
    return spec, sample_codecs(spec, first_row=first_row)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_codec_rows_shards_batches_and_interruption(data: st.DataObject) -> None:
    spec, fitted = prepared(data.draw(st.sampled_from(CODECS), label="codec"))
    rows = data.draw(st.integers(1, 9), label="rows")
    bad = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1), label="quarantined")
    stop = data.draw(st.integers(0, rows), label="rows before the interruption")
    size = sample_shard_bytes(spec, data.draw(st.integers(1, 5), label="rows per shard"))
    valid = ~np.isin(np.arange(rows), list(bad))
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):
        path = Path(folder) / "store"
        create_store(path, sample_images(rows, tuple(bad)), sample_views(rows))
        for limit in (stop, rows):
            calibrate = mock.Mock(
                return_value=fitted if limit == stop else prepared(spec.codec, 70)[1]
            )
            with FeatureWriter.open(path, spec, size, calibrate=calibrate) as writer:
                for shard in writer.missing():
                    start = shard.start
                    while start < min(shard.stop, limit):
                        length = data.draw(st.integers(1, shard.stop - start), label="batch")
                        write_rows(writer, spec, range(start, start + length), valid)
                        start += length
                if limit == rows:
                    writer.finish()
        store = FeatureStore(path)
        good = np.flatnonzero(valid)
        features = sample_features(spec, range(rows))
        pooled = "float32" if spec.codec == "float32" else "float16"
        np.testing.assert_array_equal(
            store.read("small", GLOBAL, good), features[GLOBAL][good].astype(pooled)
        )
        for target in spec.targets:
            codec = fitted[target.name].codec
            averaged = [area_average(row, target.grid) for row in features[target.level][good]]
            expected = np.stack([codec.decode(codec.encode(row)) for row in averaged])
            found = store.read("small", target.level, good, target.grid)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
            codes = store.read_codes("small", target.level, good[::-1], target.grid)
            np.testing.assert_array_equal(
                codes, np.stack([codec.encode(r) for r in averaged])[::-1]
            )
            tokens = expected.astype(np.float64)
            statistics = store.statistics("small", target.level, target.grid)
            assert statistics.count == tokens[..., 0].size
            np.testing.assert_allclose(statistics.mean, tokens.mean(axis=(0, 1, 2)), atol=1e-6)
            np.testing.assert_allclose(
                statistics.variance, tokens.var(axis=(0, 1, 2)), rtol=2e-6, atol=1e-12
            )
            kept = store.codec("small", target.level, target.grid)
            assert (kept is None) == (spec.codec in ("float16", "float32"))
            if kept is not None:
                assert kept.fidelity == fitted[target.name].fidelity
                recorded, first = (
                    describe_codec(spec.codec, target, one).digest
                    for one in (kept, fitted[target.name])
                )
                assert recorded == first


def test_resuming_keeps_the_codec_that_was_fitted_first(tmp_path: Path) -> None:
    spec, fitted = prepared("int8-pca")
    size = sample_shard_bytes(spec, 2)
    create_store(tmp_path, sample_images(4), sample_views(4))
    with pytest.raises(StoreError, match="has to be fitted"), FeatureWriter.open(tmp_path, spec):
        pass
    with FeatureWriter.open(tmp_path, spec, size, calibrate=lambda: fitted) as writer:
        write_rows(writer, spec, range(2))
        assert len(writer.missing()) < 2 or writer.missing() == [range(4)]
    again = mock.Mock(return_value=prepared("int8-pca", 70)[1])
    with FeatureWriter.open(tmp_path, spec, size, calibrate=again) as writer:
        for shard in writer.missing():
            write_rows(writer, spec, shard)
        writer.finish()
    again.assert_not_called()
    with FeatureWriter.open(tmp_path, spec, size) as writer:  # finished: needs no calibration
        assert writer.missing() == []
    found = FeatureStore(tmp_path).codec("small", "stage_1", (2, 2))
    assert found is not None
    for key, array in fitted["stage_1/2x2"].codec.parameters().items():
        np.testing.assert_array_equal(found.codec.parameters()[key], array)
