"""A batch that does not fit into memory: smaller portions, the same rows, or a clear refusal."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.data.view import Box
from stages.extract.errors import BatchTooLargeError
from stages.extract.portions import Portions
from stages.extract.teachers import Features
from stages.memory import is_out_of_memory
from store.spec import LevelSpec, TeacherSpec

SPEC = TeacherSpec(
    name="large",
    levels=(LevelSpec(name="block_00", grid=(2, 2), channels=3),),
    global_channels=3,
    provenance={},
)


def cpu_error() -> Exception:
    try:
        torch.empty(2**46, dtype=torch.float32)
    except RuntimeError as error:
        return error
    raise AssertionError


def numpy_error() -> Exception:
    try:
        np.empty(2**46, np.float32)
    except MemoryError as error:
        return error
    raise AssertionError


ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": cpu_error,
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    "python": MemoryError,
    "numpy": numpy_error,
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cublas handle": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn algorithm": lambda: RuntimeError(
        "Unable to find a valid cuDNN algorithm to run convolution"
    ),
}


@dataclass
class LimitedTeacher:
    """Means over quarters of an image, at most `limit` images at once."""

    limit: int
    error: Callable[[], Exception] = MemoryError
    pooled: bool = True
    batches: list[int] = field(default_factory=list)
    spec: TeacherSpec = SPEC

    def preprocess(self, image: np.ndarray, box: Box) -> Tensor:
        return torch.zeros(3, 4, 4)

    def __call__(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        if len(images) > self.limit:
            raise self.error()
        means = torch.nn.functional.avg_pool2d(images, 2)
        return Features(
            levels={"block_00": means.permute(0, 2, 3, 1)},
            pooled=means.mean(dim=(2, 3)) if self.pooled else None,
        )


def images(count: int) -> Tensor:
    return torch.arange(count * 48, dtype=torch.float32).reshape(count, 3, 4, 4)


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_is_halved_until_it_fits_and_says_so(
    error: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = LimitedTeacher(limit=3, error=ERRORS[error])
    portions = Portions(teacher)
    with caplog.at_level(logging.WARNING):
        portions(images(16))
        portions(images(5))
    assert teacher.batches == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith(
        "teacher 'large': out of memory with 16 images at once, going on with 8; "
        "set `extract: {batch_size: 8}`"
    )


@given(count=st.integers(1, 20), limit=st.integers(1, 20), pooled=st.booleans())
def test_rows_are_those_of_one_batch(count: int, limit: int, pooled: bool) -> None:
    expected = LimitedTeacher(limit=count, pooled=pooled)(images(count))
    found = Portions(LimitedTeacher(limit=limit, pooled=pooled))(images(count))
    torch.testing.assert_close(found.levels["block_00"], expected.levels["block_00"])
    assert (found.pooled is None) == (expected.pooled is None)
    if found.pooled is not None and expected.pooled is not None:
        torch.testing.assert_close(found.pooled, expected.pooled)


def test_one_image_that_does_not_fit_is_a_message() -> None:
    teacher = LimitedTeacher(limit=0, error=ERRORS["cuda"])
    with pytest.raises(
        BatchTooLargeError,
        match=r"'large' runs out of memory with a single image \(CUDA out of .*GiB\); choose a",
    ):
        Portions(teacher)(images(4))
    assert teacher.batches == [4, 2, 1]


def test_other_errors_pass() -> None:
    def fail() -> Exception:
        return RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    teacher = LimitedTeacher(limit=0, error=fail)
    with pytest.raises(RuntimeError, match="mat1"):
        Portions(teacher)(images(4))
    assert teacher.batches == [4]
    assert not is_out_of_memory(ValueError("out of memory"))
