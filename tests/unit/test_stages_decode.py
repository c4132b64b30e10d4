"""Codes decoded on a device are what the store decodes them to, within float32's rounding."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import decode
from store.codecs import Int8Codec
from store.decode import decode_rows


def codec(kept: int, channels: int, rotated: bool) -> Int8Codec:
    generator = np.random.default_rng(3)
    axes = np.linalg.qr(generator.normal(size=(channels, channels)))[0][:kept]
    return Int8Codec(
        scale=generator.uniform(1e-4, 1e-3, kept).astype(np.float32),
        offset=generator.normal(0, 3, channels).astype(np.float32),
        rotation=axes.astype(np.float16) if rotated else None,
    )


def every_code(kept: int) -> torch.Tensor:
    """Return codes 3 x 17 x 5 x kept in which each of the 255 is met in every channel."""
    codes = torch.arange(3 * 17 * 5)[:, None] + torch.arange(kept)
    return (codes % 255 - 127).to(torch.int8).view(3, 17, 5, kept)


@pytest.mark.parametrize("cached", [1, 100, 2**15])
@pytest.mark.parametrize(("kept", "rotated"), [(24, False), (24, True), (7, True)])
def test_batches_are_decoded_as_the_store_does(
    cached: int, kept: int, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_SERIAL_VALUES", cached)
    int8, codes = codec(kept, 24, rotated), every_code(kept)
    expected = decode_rows(int8, codes.numpy())
    found = decode.decoder(int8, torch.device("cpu"))(codes)
    assert (found.dtype, found.shape) == (torch.float32, (3, 17, 5, 24))
    # A product and a sum may round once or twice; a rotation sums as many products as components.
    unit = float(np.spacing(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=(24 if rotated else 1) * unit)
    assert len(decode.decoder(int8, torch.device("cpu"))(codes[:0])) == 0


def test_an_image_is_decoded_to_the_same_bits_in_any_batch() -> None:
    codes = every_code(24)
    decoded = decode.decoder(codec(24, 24, False), torch.device("cpu"))
    assert torch.equal(decoded(codes)[1:2], decoded(codes[1:2]))


ONE_KERNEL = """
import torch
from torch._inductor import config, metrics
config.compile_threads = 1
from stages.decode import compiled_square_law, square_law
law = compiled_square_law()
for n, kept in ((60, 24), (35, 8), (2, 5)):  # any size: compiled once
    codes = torch.randint(-127, 128, (n, kept), dtype=torch.int8)
    scale, offset = torch.rand(kept) * 1e-3, torch.randn(kept)
    torch.testing.assert_close(
        law(codes, scale, offset), square_law(codes, scale, offset), rtol=0, atol=4e-6
    )
    assert metrics.generated_kernel_count == 1, metrics.generated_kernel_count
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler to compile kernels with")
def test_what_a_gpu_runs_is_one_kernel(tmp_path: Path) -> None:
    """Shown with the compiler's other backend, for processors: the graph is the same."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", ONE_KERNEL], check=True, timeout=300, env=environment)
