"""The blocks of docs/dask.md run, one after the other, and give what our reader gives."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.reader import FeatureStore
from store.testing import sample_images, sample_teacher, write_store

ROWS, BAD = 30, 4
PAGE = Path(__file__).parents[2] / "docs" / "dask.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("dask") / "store"
    images = sample_images(ROWS, quarantined=[BAD])
    for name, codec in (("small", "float16"), ("coded", "int8-pca"), ("low_rate", "pca-4bit")):
        write_store(path, images, sample_teacher(name, codec=codec), covariance=name == "small")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    script = path.parent / "recipes.py"
    script.write_text("\n".join(blocks))
    return runpy.run_path(str(script), {"path": str(path)})


def test_the_statistics_are_those_of_the_store(found: dict[str, Any]) -> None:
    statistics = FeatureStore(found["path"]).statistics("small", "stage_1")
    assert len(found["flat"]) == statistics.count
    np.testing.assert_allclose(found["mean"], statistics.mean, rtol=1e-6)
    np.testing.assert_allclose(found["variance"], statistics.variance, rtol=1e-6)
    assert statistics.covariance is not None
    np.testing.assert_allclose(found["covariance"], statistics.covariance, atol=1e-5)


def test_no_block_is_larger_than_a_shard(found: dict[str, Any]) -> None:
    tokens_of_a_shard = 4 * 3 * 4
    assert max(found["flat"].chunks[0]) <= tokens_of_a_shard
    for name in ("features", "values", "low_rate"):
        assert max(found[name].chunks[0]) <= 4


@pytest.mark.parametrize(("name", "teacher"), [("values", "coded"), ("low_rate", "low_rate")])
def test_what_is_decoded_is_what_our_reader_gives(
    found: dict[str, Any], name: str, teacher: str
) -> None:
    good = [row for row in range(ROWS) if row != BAD]
    expected = FeatureStore(found["path"]).read(teacher, "stage_1", good)
    np.testing.assert_allclose(found[name].compute()[good], expected, rtol=1e-5, atol=1e-4)
