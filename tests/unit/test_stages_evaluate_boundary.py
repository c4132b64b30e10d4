"""Boundary F-measure: maps, matching and scores, by hand and against minimum cost."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from stages.evaluate.boundary import (
    BoundaryScores,
    boundary_scores,
    count_image,
    count_matches,
)
from stages.evaluate.boundary_maps import THRESHOLDS, boundary_pixels, suppress
from stages.evaluate.boundary_match import match, match_exactly, near_pairs


def line(shape: tuple[int, int], row: int) -> np.ndarray:
    pixels = np.zeros(shape, bool)
    pixels[row, 10:-10] = True
    return pixels


class TestMaps:
    @pytest.mark.parametrize("turned", [False, True])
    def test_a_blurred_line_becomes_one_pixel_wide(self, turned: bool) -> None:
        rows = np.arange(60)[:, None] * np.ones((1, 80))
        soft = (255 * np.exp(-((rows - 30) ** 2) / 8)).astype(np.uint8)
        kept = suppress(soft.T if turned else soft)
        kept = kept.T if turned else kept
        inside = kept[:, 10:-10]
        assert (inside[30] > 0.9).all()
        assert (np.delete(inside, 30, axis=0) == 0).all()

    def test_an_oblique_line_is_kept_connected(self) -> None:
        rows, columns = np.indices((80, 80))
        soft = (255 * np.exp(-((rows - 0.6 * columns - 10) ** 2) / 8)).astype(np.uint8)
        pixels = boundary_pixels(suppress(soft), 0.3)
        middle = pixels[:, 15:65]
        assert (middle.sum(axis=0) >= 1).all()
        assert middle.sum() < 2 * middle.shape[1]

    def test_boundaries_fade_out_at_the_border(self) -> None:
        soft = np.zeros((40, 40), np.uint8)
        soft[20] = 255
        kept = suppress(soft)
        assert kept[20, 0] == 0
        assert kept[20, 2] == pytest.approx(kept[20, 20] * 2 / 5)

    @pytest.mark.parametrize("shape", [(3, 40), (40, 2)])
    def test_tiny_maps(self, shape: tuple[int, int]) -> None:
        kept = suppress(np.full(shape, 128, np.uint8))
        assert kept.shape == shape
        assert np.isfinite(kept).all()

    def test_nothing_stays_nothing(self) -> None:
        assert not boundary_pixels(suppress(np.zeros((30, 40), np.uint8)), 0.01).any()


class TestMatching:
    def test_distance_is_allowed_to_its_end(self) -> None:
        points = np.array([[0, 0]])
        assert match(near_pairs(points, np.array([[3, 4]]), 5.0)).tolist() == [True]
        assert match(near_pairs(points, np.array([[3, 4]]), 4.99)).tolist() == [False]

    def test_one_pixel_has_one_partner(self) -> None:
        points = np.array([[0, 0], [0, 1], [0, 2]])
        assert match(near_pairs(points, np.array([[0, 1]]), 5.0)).sum() == 1

    def test_a_pixel_gives_way_so_that_more_are_matched(self) -> None:
        points = np.array([[0, 0], [0, 3]])
        others = np.array([[0, 1], [0, -2]])  # the second point reaches the first other alone
        assert match(near_pairs(points, others, 2.0)).all()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
    def test_as_many_as_at_minimum_cost(self, seed: int, count: int, others: int) -> None:
        """Against a dense assignment with outliers, and the sparse one."""
        generator = np.random.default_rng(seed)
        a = generator.integers(0, 9, (count, 2))
        b = generator.integers(0, 9, (others, 2))
        reach = 2.5
        distances = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
        costs = np.full((count + others, count + others), 100 * reach)
        costs[:count, :others] = np.where(distances <= reach, distances, 1e6)
        costs[count:, others:] = 0
        rows, columns = linear_sum_assignment(costs)
        expected = int(((rows < count) & (columns < others)).sum())
        pairs = near_pairs(a, b, reach)
        assert match(pairs).sum() == expected
        assert match_exactly(pairs, reach).sum() == expected

    def test_some_points_of_a_map(self) -> None:
        points, others = np.array([[0, 0], [0, 4], [0, 8]]), np.array([[0, 1], [0, 9]])
        some = near_pairs(points, others, 2.0).of(np.array([True, False, True]))
        assert match(some).tolist() == [True, True]
        assert match(near_pairs(points, others, 2.0)).tolist() == [True, False, True]

    def test_near_pixels_come_first(self) -> None:
        points = np.array([[0, 5], [0, 0], [0, 9]])
        others = np.array([[0, 1]])
        pairs = near_pairs(points, others, 10.0)
        assert match_exactly(pairs, 10.0).tolist() == [False, True, False]


class TestCounts:
    def test_a_line_next_to_its_label_is_right(self) -> None:
        shape = (60, 80)  # the diagonal is 100 pixels
        label = line(shape, 30)
        for row, right in ((30, True), (31, True), (32, False)):
            counts = count_matches(line(shape, row), [label], 0.0150)
            assert counts == ((60, 60, 60, 60) if right else (0, 60, 0, 60))

    def test_right_for_any_annotator_found_for_each(self) -> None:
        shape = (60, 80)
        annotations = [line(shape, 30), line(shape, 10)]
        assert count_matches(line(shape, 30), annotations) == (60, 60, 60, 120)
        both = line(shape, 30) | line(shape, 10)
        assert count_matches(both, annotations) == (120, 120, 120, 120)

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_annotators_have_no_order(self, order: tuple[int, ...]) -> None:
        generator = np.random.default_rng(0)
        annotations = [generator.random((40, 50)) < 0.05 for _ in range(3)]
        pixels = generator.random((40, 50)) < 0.05
        expected = count_matches(pixels, annotations, 0.03)
        assert count_matches(pixels, [annotations[k] for k in order], 0.03) == expected

    def test_nothing_predicted_or_labelled(self) -> None:
        empty, label = np.zeros((60, 80), bool), line((60, 80), 30)
        assert count_matches(empty, [label]) == (0, 0, 0, 60)
        assert count_matches(label, [empty]) == (0, 60, 0, 0)
        assert count_matches(empty, [empty]) == (0, 0, 0, 0)

    def test_every_threshold_of_an_image(self) -> None:
        soft = np.zeros((60, 80), np.uint8)
        soft[30, 10:-10] = 102  # 0.4; smoothed across to 0.2
        counts = count_image(soft, [line((60, 80), 30)], 0.02)
        assert counts.shape == (99, 4)
        predicted = counts[:, 1]
        assert predicted[:15].min() > 50
        assert (predicted[25:] == 0).all()
        assert (counts[:, 3] == 60).all()


def scores(*images: list[tuple[int, int, int, int]]) -> BoundaryScores:
    """Scores of images whose counts are given at first thresholds, and nothing predicted later."""
    counts = []
    for image in images:
        labelled = image[0][3]
        counts.append(np.array([*image, *[(0, 0, 0, labelled)] * (99 - len(image))]))
    return boundary_scores(counts)


class TestScores:
    def test_a_perfect_set(self) -> None:
        found = boundary_scores([np.tile([50, 50, 50, 50], (99, 1))])
        assert (found.ods, found.ois) == (1, 1)

    def test_one_threshold_for_all_against_one_for_each(self) -> None:
        good, bad = (10, 10, 10, 10), (0, 0, 0, 10)
        noisy = (10, 30, 10, 10)
        found = scores([noisy, good], [good, bad])
        # pooled: threshold 1 P 20/40 R 20/20, threshold 2 P 10/10 R 10/20: F 2/3 at both ends
        assert found.ods == pytest.approx(
            max(
                2 * p * r / (p + r)
                for d in np.arange(101) / 100
                for p, r in [(0.5 + 0.5 * d, 1 - 0.5 * d)]
            )
        )
        assert found.ois == 1

    def test_area_of_a_straight_curve(self) -> None:
        images = [
            (right, predicted, found, 100)
            for right, predicted, found in zip(
                range(100, 0, -1), [100] * 99 + [1], range(100, 0, -1), strict=True
            )
        ][:99]
        found = boundary_scores([np.array(images)])
        recall = np.array([row[2] / 100 for row in images])
        at = np.arange(101) / 100
        expected = sum(r for r in at if recall.min() <= r <= recall.max()) / 100
        assert found.ap == pytest.approx(expected)

    def test_nothing_at_all(self) -> None:
        found = boundary_scores([np.zeros((99, 4), int)])
        assert (found.ods, found.ois, found.ap) == (0, 0, 0)
        assert math.isfinite(found.threshold)
        with pytest.raises(ValueError, match="at least one image"):
            boundary_scores([])

    def test_thresholds(self) -> None:
        assert len(THRESHOLDS) == 99
        assert (THRESHOLDS[0], THRESHOLDS[-1]) == (0.01, 0.99)
