"""Fitting: orthonormal rotations, bits that share bytes, distortion against theory."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.calibration import measure
from store.codecs import BitCodec, Int8Codec, Values
from store.fit import MAX_BITS, MAX_BLOCK_VALUES, fit_codec
from store.hadamard import hadamard

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 4: 0.009497}
"""Mean squared error of a Gaussian of variance one on 2**bits steps (Max 1960, table 1)."""


def gaussian(count: int, correlation: float, channels: int = 32, seed: int = 0) -> Values:
    """Return (count, 1, 1, C) tokens whose neighbouring channels are correlated."""
    lags = np.abs(np.subtract.outer(np.arange(channels), np.arange(channels)))
    root = np.linalg.cholesky(correlation**lags + 1e-9 * np.eye(channels))
    tokens = np.random.default_rng(seed).normal(size=(count, 1, 1, channels)) @ root.T
    return tokens.astype(np.float32)


def distortion(name: str, correlation: float) -> float:
    """Return the squared error over the energy on tokens that were not fitted to."""
    codec = fit_codec(name, gaussian(8192, correlation))
    return measure(codec, gaussian(4096, correlation, seed=1)).relative_l2 ** 2


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_a_gaussian_source_comes_close_to_the_theory(bits: int) -> None:
    # Above 1 are: 3 / C, for an error along the token counts twice in y * norm(y), so four times
    # squared; and that steps which fit 8192 tokens fit others a little worse.
    found = distortion(f"pca-{bits}bit", 0.0)
    assert 4.0**-bits < found < 1.2 * LLOYD_MAX[bits]


def test_correlation_is_used() -> None:
    channels, correlation, bits = 32, 0.95, 2
    spectrum = np.linalg.eigvalsh(
        correlation ** np.abs(np.subtract.outer(np.arange(channels), np.arange(channels)))
    )
    # Reverse water-filling (Cover & Thomas, 10.3.3): no code of this rate does better.
    levels = np.geomspace(1e-4, 1, 10_000)
    rates = np.log2(np.maximum(spectrum / levels[:, None], 1)).mean(axis=1) / 2
    water = levels[np.searchsorted(-rates, -bits)]
    bound = np.minimum(spectrum, water).mean()
    found = distortion(f"pca-{bits}bit", correlation)
    assert bound < found < 4 * bound
    assert found < distortion(f"pca-{bits}bit", 0.0) / 4


@pytest.mark.parametrize("name", ["int8-hadamard", "int8-pca", "int8-pca7", "pca-6bit"])
@pytest.mark.parametrize("channels", [8, 24])
def test_rotations_are_orthonormal(name: str, channels: int) -> None:
    codec = fit_codec(name, gaussian(512, 0.9, channels))
    assert not hasattr(codec, "dtype") or codec.dtype in ("|i1", "|u1")
    assert isinstance(codec, Int8Codec | BitCodec)
    assert codec.rotation is not None
    rows = codec.rotation.astype(np.float64)
    # float16 keeps 11 bits, so that a product of unit rows is off by 2 * 2**-11 at most
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), rtol=0, atol=2**-10)
    if name == "int8-pca7":
        assert rows.shape == (7, channels)
        variances = ((gaussian(512, 0.9, channels)[:, 0, 0] @ rows.T) ** 2).mean(axis=0)
        assert (np.diff(variances) < 0).all()


@pytest.mark.parametrize("order", range(1, 130))
def test_hadamard_matrices_are_what_they_claim(order: int) -> None:
    matrix = hadamard(order)
    if matrix is None:
        assert order % 4 or order in (52, 92, 100, 116)
        return
    assert set(np.unique(np.abs(matrix))) == {1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


def test_outlier_channels_gain_from_a_rotation() -> None:
    sample = gaussian(1024, 0.0)
    sample[::97, ..., 3] *= 100  # rare massive activations widen the steps of their channel only
    lost = {name: measure(fit_codec(name, sample), sample) for name in ("int8", "int8-pca")}
    assert min(fidelity.cosine_p01 for fidelity in lost.values()) > 0.99


@settings(max_examples=12, deadline=None)
@given(
    channels=st.integers(1, 5),
    edge=st.sampled_from([1, 2, 4]),
    bits=st.integers(1, 6),
    spread=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_bits_share_bytes_without_overlap(
    channels: int, edge: int, bits: int, spread: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    channel_scales = np.exp(generator.normal(0, spread, channels))
    sample = (generator.normal(size=(48, edge, edge, channels)) * channel_scales).astype(np.float32)
    codec = fit_codec(f"pca-{bits}bit", sample)
    assert isinstance(codec, BitCodec)
    values = int(codec.block) ** 2 * channels
    assert int(codec.block) == edge
    assert values <= MAX_BLOCK_VALUES
    budget = math.ceil(bits * values / 8)
    assert codec.stored_shape((edge, 3 * edge, channels)) == (1, 3, budget)
    taken = np.zeros(budget, np.int64)
    for byte, shift, mask in zip(codec.byte, codec.shift, codec.mask, strict=True):
        used = int(mask) << int(shift)
        assert 0 < int(mask) < 2**MAX_BITS
        assert int(mask) & (int(mask) + 1) == 0  # ones only
        assert used < 256
        assert not taken[byte] & used
        taken[byte] |= used
    ends = codec.first + codec.mask + 1
    np.testing.assert_array_equal(codec.first[1:], ends[:-1])
    assert ends[-1] == len(codec.table)
    for start, end in zip(codec.first, ends, strict=True):
        assert (np.diff(codec.table[start:end]) >= 0).all()  # else the nearest is not found


@settings(max_examples=4, deadline=None)
@given(channels=st.integers(2, 9), correlation=st.floats(0, 0.95), seed=st.integers(0, 99))
def test_more_bits_never_lose_more(channels: int, correlation: float, seed: int) -> None:
    sample = gaussian(256, correlation, channels, seed)
    found = [measure(fit_codec(f"pca-{bits}bit", sample), sample) for bits in range(1, 7)]
    cosines = np.array([fidelity.cosine_mean for fidelity in found])
    errors = np.array([fidelity.relative_l2 for fidelity in found])
    # What is minimised is the error of tokens over the root of their norm, hence the tolerance.
    assert (np.diff(cosines) > -1e-3).all()
    assert (np.diff(errors) < 3e-3).all()


def test_a_channel_of_denormal_numbers_is_no_obstacle() -> None:
    tiles = np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype(np.float32)
    tiles[..., 1] *= np.float32(1e-41)
    codec = fit_codec("int8", tiles)
    decoded = codec.decode(codec.encode(tiles[0]))
    np.testing.assert_allclose(decoded[..., 1], tiles[0, ..., 1], atol=1e-37)
