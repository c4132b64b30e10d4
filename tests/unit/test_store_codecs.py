"""Encoding and decoding: bounds on what is lost, odd shapes, odd values, exact sizes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.calibration import measure
from store.codecs import Codec, Int8Codec, Values, from_blocks, parse_codec, to_blocks
from store.errors import StoreError
from store.fit import HEADROOM, fit_codec

FITTED = ["int8", "int8-hadamard", "int8-pca", "int8-pca5", "pca-1bit", "pca-4bit", "pca-6bit"]
ALL = ["float32", "float16", *FITTED]


def tiles(channels: int = 8, edge: int = 2, count: int = 64, seed: int = 0) -> Values:
    """Tokens (count, edge, edge, channels) of one source, correlated and with a mean."""
    source, generator = np.random.default_rng(channels), np.random.default_rng(seed)
    mixing = source.normal(size=(channels, channels))
    tokens = generator.normal(size=(count, edge, edge, channels)) @ mixing
    return (tokens + 3 * source.normal(size=channels)).astype(np.float32)


def sample_row(channels: int = 8, grid: tuple[int, int] = (8, 4), seed: int = 9) -> Values:
    return tiles(channels, 1, math.prod(grid), seed).reshape(*grid, channels)


def error(codec: Codec, row: Values) -> float:
    decoded = codec.decode(codec.encode(row))
    return float(np.linalg.norm(decoded - row) / np.linalg.norm(row))


@pytest.mark.parametrize("name", ALL)
def test_a_row_gives_the_same_bits_in_any_batch_and_memory_order(name: str) -> None:
    codec = fit_codec(name, tiles(32, edge=1, count=256))
    batch = np.stack([sample_row(32, (14, 14), seed) for seed in range(3)])
    channels_first = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    widened = np.repeat(batch, 2, axis=3)[..., ::2]
    for index, row in enumerate(batch):
        alone = codec.encode(row.copy())
        assert alone.dtype == np.dtype(codec.dtype)
        assert alone.shape == codec.stored_shape(row.shape)
        for other in (batch, channels_first, widened):
            np.testing.assert_array_equal(codec.encode(other[index]), alone)
        decoded = codec.decode(alone)
        assert decoded.shape == row.shape
        np.testing.assert_array_equal(codec.decode(np.stack([alone] * 2)[1]), decoded)
        np.testing.assert_array_equal(row, row)  # nothing was changed in place


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 7),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    beyond=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_int8_errors_stay_within_the_step(
    channels: int, magnitude: float, beyond: float, seed: int
) -> None:
    sample = tiles(channels, seed=seed) * np.float32(magnitude)
    codec = fit_codec("int8", sample)
    assert isinstance(codec, Int8Codec)
    row = (sample[:16, 0] - codec.offset) * np.float32(beyond) + codec.offset
    distance = np.abs(row.astype(np.float64) - codec.offset)
    scale = codec.scale.astype(np.float64)
    reach = 127**2 * scale
    largest = np.abs(sample - codec.offset).max(axis=(0, 1, 2))
    np.testing.assert_allclose(reach, HEADROOM * largest, rtol=1e-5)
    # t = root(d / scale) is rounded to q, |t - q| <= 1/2: scale |t^2 - q^2| <= scale (t + 1/4)
    step = np.sqrt(scale * distance) + scale / 4
    allowed = np.maximum(step, distance - reach)
    rounding = 1e-5 * (distance + np.abs(codec.offset))
    lost = np.abs(codec.decode(codec.encode(row)).astype(np.float64) - row)
    assert (lost <= allowed + rounding).all()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("channels", [5, 7, 12])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 6)])
def test_odd_channels_and_grids(name: str, channels: int, grid: tuple[int, int]) -> None:
    if name == "int8-hadamard" and channels != 12:
        with pytest.raises(StoreError, match=f"order {channels} is known; use int8-pca"):
            fit_codec(name, tiles(channels))
        return
    edge = 2 if grid == (4, 6) else 1
    codec = fit_codec(name, tiles(channels, edge))
    row = sample_row(channels, grid)
    decoded = codec.decode(codec.encode(row))
    assert decoded.shape == row.shape
    assert decoded.dtype == np.float32
    kept = 5 / channels if name == "int8-pca5" else 1
    assert error(codec, row) < (0.8 if kept < 1 or name == "pca-1bit" else 0.2)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_magnitudes_change_nothing(name: str, magnitude: float) -> None:
    sample, row = tiles(), sample_row()
    plain = error(fit_codec(name, sample), row)
    scaled = error(fit_codec(name, sample * np.float32(magnitude)), row * np.float32(magnitude))
    assert scaled == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("name", FITTED)
def test_dead_channels_and_zero_tokens(name: str) -> None:
    sample, row = tiles(), sample_row()
    sample[..., [1, 6]] = row[..., [1, 6]] = 0.1
    row[2, 3] = 0
    codec = fit_codec(name, sample)
    decoded = codec.decode(codec.encode(row))
    assert np.isfinite(decoded).all()
    if name == "int8":
        live = np.any(row != 0, axis=-1)
        np.testing.assert_array_equal(decoded[live][:, [1, 6]], np.float32(0.1))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
def test_a_constant_level_comes_back(name: str, value: float) -> None:
    # Summed in float32, the mean of so many equal numbers would be another number.
    codec = fit_codec(name, np.full((4096, 2, 2, 8), value, np.float32))
    row = np.full((4, 4, 8), value, np.float32)
    decoded = codec.decode(codec.encode(row))
    tolerance = 0 if name.startswith("int8") else 1e-5 * abs(value)
    np.testing.assert_allclose(decoded, row, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_floats_are_only_rounded(name: str) -> None:
    codec, row = fit_codec(name, tiles()), sample_row()
    np.testing.assert_array_equal(codec.decode(codec.encode(row)), row.astype(name))
    assert codec.parameters() == {}
    fidelity = measure(fit_codec("float32", tiles()), tiles())
    assert (fidelity.cosine_mean, fidelity.cosine_p01, fidelity.relative_l2) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("edge", [1, 2, 4])
def test_blocks_are_undone(edge: int) -> None:
    row = sample_row(3, (8, 4))
    blocks = to_blocks(row, edge)
    assert blocks.shape == (8 // edge, 4 // edge, edge**2 * 3)
    np.testing.assert_array_equal(from_blocks(blocks, edge), row)
    np.testing.assert_array_equal(blocks[0, 0].reshape(edge, edge, 3), row[:edge, :edge])


@pytest.mark.parametrize(
    "name", ["float64", "int4", "int8-pca0", "int8-hadamard8", "int8-8", "pca-7bit", "pca-0bit", ""]
)
def test_other_names_are_refused_with_advice(name: str) -> None:
    with pytest.raises(StoreError, match="use float32, float16, int8"):
        parse_codec(name)


def test_more_components_than_channels_are_refused() -> None:
    with pytest.raises(StoreError, match="int8-pca9 keeps more components than 8"):
        fit_codec("int8-pca9", tiles())
