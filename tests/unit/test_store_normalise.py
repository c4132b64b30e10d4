"""Normalised features have the moments they promise, whatever the covariance, and come back."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.errors import StoreError
from store.hadamard import hadamard
from store.normalise import EPSILON, AffineMap, equalising_rotation, phi_s, whitening, z_score
from store.statistics import Statistics

MAPS = [z_score, phi_s, whitening]
Tokens = NDArray[np.float64]


def statistics_of(tokens: Tokens) -> Statistics:
    """Return what a store of these tokens (n, C), which float16 holds exactly, would say."""
    count, channels = tokens.shape
    values = tokens.astype(np.float16).reshape(1, count, channels)
    np.testing.assert_array_equal(values[0], tokens)
    covariance = np.cov(tokens, rowvar=False, bias=True).reshape(channels, channels)
    variance = np.diag(covariance).copy()
    return Statistics(
        count=count, mean=tokens.mean(axis=0), variance=variance, covariance=covariance
    )


def sample_tokens(
    seed: int, count: int, channels: int, offset: float = 0.0, dead: int = 0, spread: float = 1.0
) -> Tokens:
    """Return correlated tokens; the first `dead` channels are constant."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(0, 1, (channels, channels)) * np.geomspace(1, spread, channels)
    tokens = generator.normal(0, 1, (count, channels)) @ mixing + offset
    tokens[:, :dead] = offset
    return tokens.astype(np.float16).astype(np.float64)


@st.composite
def cases(draw: st.DrawFn) -> Tokens:
    channels = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 12, 20, 24, 52]))
    tokens = sample_tokens(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(2, 3 * channels + 3)),  # also fewer tokens than channels
        channels,
        offset=draw(st.sampled_from([0.0, 50.0])),
        dead=draw(st.integers(0, channels - 1)),
        spread=draw(st.sampled_from([1.0, 30.0])),
    )
    assume(tokens.var(axis=0).any())  # two tokens of one channel can round to the same
    return tokens


def covariance(tokens: Tokens) -> Tokens:
    return np.atleast_2d(np.cov(tokens, rowvar=False, bias=True))


@pytest.mark.parametrize("normalise", MAPS)
@settings(deadline=None)
@given(tokens=cases())
def test_any_features_come_back(
    normalise: Callable[[Statistics], AffineMap], tokens: Tokens
) -> None:
    found = normalise(statistics_of(tokens))
    normalised = found.apply(tokens)
    assert np.isfinite(normalised).all()
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-8)
    np.testing.assert_allclose(found.invert(normalised), tokens, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(tokens=cases())
def test_z_score_gives_variance_one_to_live_channels(tokens: Tokens) -> None:
    variance = tokens.var(axis=0)
    found = z_score(statistics_of(tokens)).apply(tokens).var(axis=0)
    live = variance > 2 * EPSILON * variance.mean()
    np.testing.assert_allclose(found[live], 1, rtol=1e-9)
    np.testing.assert_array_less(found[~live], 1 + 1e-9)
    np.testing.assert_array_equal(found[variance == 0], 0)


@settings(deadline=None)
@given(tokens=cases())
def test_phi_s_gives_variance_one_and_keeps_the_proportions_of_distances(tokens: Tokens) -> None:
    normalised = phi_s(statistics_of(tokens)).apply(tokens)
    np.testing.assert_allclose(normalised.var(axis=0), 1, rtol=1e-9)
    before = np.linalg.norm(tokens[:, None] - tokens, axis=-1)
    after = np.linalg.norm(normalised[:, None] - normalised, axis=-1)
    scale = np.sqrt(tokens.var(axis=0).mean())
    np.testing.assert_allclose(after * scale, before, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(tokens=cases())
def test_whitening_gives_variance_one_along_every_live_direction(tokens: Tokens) -> None:
    normalised = whitening(statistics_of(tokens)).apply(tokens)
    variances, axes = np.linalg.eigh(covariance(tokens))
    along = (normalised @ axes).var(axis=0)
    live = variances > 2 * EPSILON * variances.mean()
    np.testing.assert_allclose(along[live], 1, rtol=1e-6)
    assert (along[~live] <= 1 + 1e-6).all()


def test_whitening_of_full_rank_gives_the_identity() -> None:
    tokens = sample_tokens(0, 400, 12, offset=5)
    found = whitening(statistics_of(tokens))
    np.testing.assert_allclose(covariance(found.apply(tokens)), np.eye(12), atol=1e-9)
    np.testing.assert_allclose(found.matrix, found.matrix.T, atol=1e-12)


@pytest.mark.parametrize("channels", [24, 50, 96, 320, 384, 768])
def test_phi_s_serves_the_channel_counts_of_networks(channels: int) -> None:
    generator = np.random.default_rng(channels)
    root = generator.normal(0, 1, (channels, channels)) * np.geomspace(1, 100, channels)
    full = root.T @ root
    statistics = Statistics(
        count=10**6, mean=np.zeros(channels), variance=np.diag(full).copy(), covariance=full
    )
    matrix = phi_s(statistics).matrix
    np.testing.assert_allclose(np.diag(matrix.T @ full @ matrix), 1, rtol=1e-9)
    gram = matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(channels) * gram[0, 0], atol=1e-9 * gram[0, 0])


def test_a_solver_that_turns_eigenvectors_around_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = statistics_of(sample_tokens(0, 90, 12))
    matrix = phi_s(statistics).matrix
    values, vectors = np.linalg.eigh(statistics.covariance)
    turned = vectors * np.resize([-1, 1, 1], 12)
    monkeypatch.setattr(np.linalg, "eigh", lambda _: (values, turned))
    np.testing.assert_array_equal(phi_s(statistics).matrix, matrix)


@pytest.mark.parametrize("normalise", MAPS)
def test_maps_take_grids_of_any_shape(normalise: Callable[[Statistics], AffineMap]) -> None:
    tokens = sample_tokens(0, 24, 5)
    found = normalise(statistics_of(tokens))
    grid = tokens.reshape(2, 3, 4, 5).astype(np.float16)
    assert found.apply(grid).dtype == np.float64
    np.testing.assert_allclose(found.apply(grid).reshape(24, 5), found.apply(tokens))
    back = found.invert(found.apply(grid))
    np.testing.assert_allclose(back, tokens.reshape(grid.shape), atol=1e-12)


@pytest.mark.parametrize("normalise", MAPS)
@pytest.mark.parametrize("value", [0.0, 0.1, 60000.0])
def test_a_level_that_never_varies_is_refused(
    normalise: Callable[[Statistics], AffineMap], value: float
) -> None:
    tokens = np.full((7, 3), np.float16(value), np.float64)
    with pytest.raises(StoreError, match="none of the 3 channels varies over 7 tokens"):
        normalise(statistics_of(tokens))


@pytest.mark.parametrize("normalise", [z_score, whitening])
@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_an_epsilon_that_bounds_nothing_is_refused(
    normalise: Callable[[Statistics, float], AffineMap], epsilon: float
) -> None:
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        normalise(statistics_of(sample_tokens(0, 9, 3)), epsilon)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 96, 160, 320, 384, 768, 1024])
def test_hadamard_matrices_are(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    np.testing.assert_array_equal(np.abs(matrix), np.ones((order, order)))
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@given(order=st.integers(1, 200))
def test_every_hadamard_matrix_given_is_one(order: int) -> None:
    matrix = hadamard(order)
    if matrix is None:
        assert order % 4 or order in {52, 92, 100, 116, 156, 172, 184, 188}
    else:
        np.testing.assert_array_equal(np.abs(matrix), np.ones((order, order)))
        np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_equalising_rotation_equalises_any_diagonal(values: list[float]) -> None:
    diagonal = np.array(values)
    rotation = equalising_rotation(diagonal)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(values)), atol=1e-12)
    turned = np.diag(rotation.T @ np.diag(diagonal) @ rotation)
    np.testing.assert_allclose(turned, diagonal.mean(), rtol=1e-9, atol=1e-9)
