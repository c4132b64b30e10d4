"""Calibration: the same codec from the same rows, bounded memory, an honest measure; the pyramid."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import store.calibration
from store.calibration import MAX_TOKENS, Calibration, measure, tile_edge
from store.codecs import FloatCodec, Int8Codec
from store.errors import StoreError
from store.fit import fit_codec
from store.pyramid import area_average
from store.spec import LevelSpec, Target, TeacherSpec


def teacher(*levels: LevelSpec) -> TeacherSpec:
    return TeacherSpec(name="t", levels=levels, provenance={})


SPEC = teacher(LevelSpec(name="a", grid=(4, 4), channels=3, stored=((4, 4), (3, 2))))


def row(index: int, grid: tuple[int, int] = (4, 4), channels: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(index)
    return {"a": generator.normal(index, 1, (*grid, channels)).astype(np.float32)}


def gather(spec: TeacherSpec, rows: int) -> Calibration:
    calibration = Calibration(spec, rows)
    for index in range(rows):
        calibration.add(row(index, spec.levels[0].grid), held_out=index % 5 == 1)
    return calibration


@pytest.mark.parametrize("codec", ["int8", "int8-pca", "pca-2bit"])
def test_the_same_rows_give_the_same_codec(codec: str) -> None:
    first, second = gather(SPEC, 7).fit(codec), gather(SPEC, 7).fit(codec)
    assert first.keys() == {"a/native", "a/3x2"}
    for name, fitted in first.items():
        assert fitted.fidelity == second[name].fidelity
        other = second[name].codec.parameters()
        for key, array in fitted.codec.parameters().items():
            np.testing.assert_array_equal(array, other[key])


def test_fitted_to_one_half_and_measured_on_the_other() -> None:
    calibration = Calibration(SPEC, 4)
    for index in range(4):  # the rows that are held out lie far beyond what is fitted to
        values = {"a": row(0)["a"] * (100 if index % 2 else 1)}
        calibration.add(values, held_out=index % 2 == 1)
    fitted = calibration.fit("int8")["a/native"]
    assert isinstance(fitted.codec, Int8Codec)
    assert np.abs(fitted.codec.scale * 127**2).max() < 5
    assert fitted.fidelity.relative_l2 > 0.9
    assert measure(fitted.codec, row(0)["a"][None]).relative_l2 < 0.02


@pytest.mark.parametrize("rows", [2, 3, 64, 1000])
@pytest.mark.parametrize("grid", [(16, 16), (15, 6), (1, 1)])
def test_tokens_kept_are_bounded_and_spread(rows: int, grid: tuple[int, int]) -> None:
    spec = teacher(LevelSpec(name="a", grid=grid, channels=1))
    (target,) = spec.targets
    most = 1024
    with mock.patch.object(store.calibration, "MAX_TOKENS", most):
        calibration = Calibration(spec, rows)
        for index in range(rows):
            values = {"a": np.full((*grid, 1), index, np.float32)}
            calibration.add(values, held_out=index % 5 == 1)
            calibration.add(values, held_out=False)  # more than was promised
    fitted, held_out = (
        np.concatenate(half[target.name].tiles)
        for half in (calibration._fitted, calibration._held_out)
    )
    assert fitted.shape[1:] == (tile_edge(target), tile_edge(target), 1)
    assert 0 < held_out.size <= fitted.size <= most
    assert held_out.min() == 1  # even the first row gives some
    sampled = len(np.unique(held_out)) / len(range(1, rows, 5))
    assert sampled == 1 or len(held_out) >= most / fitted[0].size / 6
    assert MAX_TOKENS == 32_768


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(StoreError, match="got 1 in all"):
        Calibration(SPEC, 1)
    for held_out in (True, False):
        calibration = Calibration(SPEC, 2)
        calibration.add(row(0), held_out=held_out)
        with pytest.raises(StoreError, match="rows to fit to and others to measure on"):
            calibration.fit("int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    calibration, bad = Calibration(SPEC, 2), row(0)
    bad["a"][1, 2, 0] = value
    with pytest.raises(StoreError, match=r"calibration, level 'a'.*NaN or infinity"):
        calibration.add(bad, held_out=False)


def test_measure_says_what_is_lost() -> None:
    tokens = np.random.default_rng(0).normal(size=(5, 2, 2, 4)).astype(np.float32)
    tokens[0, 0, 0] = 0
    whole = measure(FloatCodec(dtype="<f4"), tokens)
    assert (whole.cosine_mean, whole.cosine_p01, whole.relative_l2) == (1.0, 1.0, 0.0)
    half = measure(FloatCodec(dtype="<f2"), tokens)
    assert 0 < half.relative_l2 < 2**-11
    assert half.cosine_p01 > 1 - 2**-20
    coarse = Int8Codec(scale=np.full(4, 10, np.float32), offset=np.zeros(4, np.float32))
    assert measure(coarse, tokens * 0).relative_l2 == 0
    decoded = coarse.decode(coarse.encode(tokens[0]))
    similar = torch.nn.functional.cosine_similarity(
        torch.from_numpy(decoded), torch.from_numpy(tokens[0]), dim=-1
    ).numpy()
    similar = similar.ravel()[1:]  # the token of zeros has no direction to lose
    found = measure(coarse, tokens[:1])
    assert found.cosine_mean == pytest.approx(similar.mean())
    assert found.cosine_p01 == pytest.approx(np.quantile(similar, 0.01), abs=1e-6)
    lost = np.linalg.norm(decoded - tokens[0]) / np.linalg.norm(tokens[0])
    assert found.relative_l2 == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize(
    ("grid", "edge"), [((8, 12), 4), ((4, 6), 2), ((14, 14), 2), ((3, 4), 1), ((1, 1), 1)]
)
def test_tiles_divide_the_grid(grid: tuple[int, int], edge: int) -> None:
    assert tile_edge(Target(level="a", grid=grid, channels=1, resolution="native")) == edge


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    cells=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_area_average_is_the_mean_over_each_area(
    grid: tuple[int, int], cells: tuple[int, int], channels: int, offset: float
) -> None:
    cells = min(cells[0], grid[0]), min(cells[1], grid[1])
    values = np.random.default_rng(7).normal(offset, 1, (*grid, channels)).astype(np.float32)
    found = area_average(values, cells)
    # Cut every token in as many parts as make both grids whole numbers of parts.
    parts = values.astype(np.float64).repeat(cells[0], 0).repeat(cells[1], 1)
    expected = parts.reshape(cells[0], grid[0], cells[1], grid[1], channels).mean(axis=(1, 3))
    tolerance = 3e-6 * max(1, offset)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        found.mean(axis=(0, 1), dtype=np.float64),
        values.mean(axis=(0, 1), dtype=np.float64),
        rtol=0,
        atol=tolerance,
    )
    if cells == grid:
        np.testing.assert_array_equal(found, values)
    if grid[0] % cells[0] == 0 and grid[1] % cells[1] == 0:
        theirs = torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(values).permute(2, 0, 1), cells
        )
        np.testing.assert_allclose(found, theirs.permute(1, 2, 0), rtol=0, atol=tolerance)


def test_area_average_takes_any_float_and_memory_order() -> None:
    values = np.random.default_rng(1).normal(size=(6, 9, 4)).astype(np.float16)
    found = area_average(values, (4, 5))
    assert found.dtype == np.float32
    turned = np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_array_equal(area_average(turned, (4, 5)), found)
    np.testing.assert_array_equal(area_average(values, (6, 9)), values)


def test_tokens_of_zeros_are_left_out_of_the_cosine() -> None:
    tiles = np.random.default_rng(0).normal(2, 1, size=(64, 4, 4, 3)).astype(np.float32)
    tiles[8:] = 0
    codec = fit_codec("int8", tiles)
    assert measure(codec, tiles).cosine_mean > 0.99
    assert measure(codec, np.zeros_like(tiles)).cosine_mean == 1.0
