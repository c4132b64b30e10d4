"""Fixtures of the tests that train: one small data set and its store per module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.data.config import NyudData
from stages.data.dataset import Dataset, open_dataset
from stages.train.testing import make_root
from store.reader import FeatureStore


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def dataset(root: Path) -> Dataset:
    return open_dataset(NyudData(kind="nyud", root=root / "data"))


@pytest.fixture(scope="module")
def store(root: Path) -> FeatureStore:
    return FeatureStore(root / "features.zarr")
