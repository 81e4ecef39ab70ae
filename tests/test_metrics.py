import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from fsdino.metrics import FewShotScore, boundary_of, count


def scored(class_ids, *episodes):
    score = FewShotScore(class_ids)
    for prediction, label, class_id in episodes:
        score.add(count(np.array(prediction, bool), np.array(label, np.uint8)), class_id)
    return score


def test_scores_are_ratios_of_sums_as_computed_by_hand():
    result = scored(
        [3, 7],
        ([[1, 1, 0, 0]], [[1, 0, 1, 0]], 3),  # I 1, U 3; background I 1, U 3
        ([[1, 1, 1, 0]], [[1, 1, 1, 0]], 3),  # I 3, U 3; background I 1, U 1
        ([[0, 1, 0, 0]], [[0, 1, 1, 1]], 7),  # I 1, U 3; background I 1, U 3
    ).result()
    assert result["per_class"] == {3: pytest.approx(4 / 6), 7: pytest.approx(1 / 3)}
    assert result["miou"] == pytest.approx((4 / 6 + 1 / 3) / 2)
    assert result["fb_iou"] == pytest.approx((5 / 9 + 3 / 7) / 2)


def test_void_pixels_are_not_scored():
    score = scored([1], ([[1, 1, 0]], [[1, 255, 255]], 1))
    assert score.result()["miou"] == 1.0
    assert count(np.array([[True, True, False]]), np.array([[1, 255, 255]], np.uint8))[:4] == (0, 0, 1, 1)


def test_a_class_without_an_episode_has_no_say():
    result = scored([1, 2], ([[1]], [[1]], 1)).result()
    assert (result["miou"], result["fb_iou"], result["per_class"]) == (1.0, 0.5, {1: 1.0})


def test_sums_are_of_64_bits_and_do_not_depend_on_how_episodes_are_grouped():
    rng = np.random.default_rng(0)
    counts = [count(rng.random((9, 7)) < 0.4, rng.choice([0, 1, 255], (9, 7)).astype(np.uint8)) for _ in range(12)]
    whole, parts = FewShotScore([1]), [FewShotScore([1]) for _ in range(3)]
    for number, one in enumerate(counts):
        whole.add(one, 1)
        parts[number % 3].add(one, 1)
    assert whole.sums[1].dtype == np.int64
    assert np.array_equal(whole.sums[1], sum(part.sums[1] for part in parts))


def evaluator(prediction, label, classes):
    """The published evaluators in other words: histograms of pixels that agree, by class, void taken out first."""
    inter, union = np.zeros((2, classes)), np.zeros((2, classes))
    for guess, truth, c in zip(prediction, label, range(classes), strict=True):
        kept = truth != 255
        guess, truth = guess[kept].astype(int), truth[kept].astype(int)
        agree = np.bincount(guess[guess == truth], minlength=2)
        inter[:, c] += agree
        union[:, c] += np.bincount(guess, minlength=2) + np.bincount(truth, minlength=2) - agree
    return (inter[1] / np.maximum(union[1], 1)).mean(), (inter.sum(1) / np.maximum(union.sum(1), 1)).mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30), st.integers(1, 30))
def test_random_predictions_score_as_by_another_evaluator(seed, classes, height, width):
    rng = np.random.default_rng(seed)
    guesses = rng.random((classes, height, width)) < rng.random()
    labels = rng.choice([0, 1, 255], (classes, height, width), p=[0.5, 0.3, 0.2]).astype(np.uint8)
    result = scored(range(classes), *zip(guesses, labels, range(classes), strict=True)).result()
    miou, fb_iou = evaluator(guesses, labels, classes)
    assert result["miou"] == pytest.approx(miou, abs=1e-12) and result["fb_iou"] == pytest.approx(fb_iou, abs=1e-12)


def test_a_boundary_is_what_erosion_takes_away_the_images_edge_included():
    mask = np.zeros((80, 60), bool)
    mask[0:40, 5:30] = True
    mask[50:54, 40:60] = True
    core = binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=2)[1:-1, 1:-1]  # 2 % of the diagonal of 100
    assert np.array_equal(boundary_of(mask), mask & ~core)
    assert boundary_of(mask)[0, 10] and not boundary_of(mask)[10, 15]
    assert not boundary_of(np.zeros((80, 60), bool)).any()


def test_boundary_iou_is_that_of_the_boundaries_as_counted_by_hand():
    square, moved = np.zeros((60, 80), bool), np.zeros((60, 80), bool)
    square[10:30, 10:30] = True
    moved[10:30, 14:34] = True
    found = count(moved, square.astype(np.uint8))
    # Rings two pixels wide: 400 - 16 * 16 = 144. Two pieces of two rows of 16 columns are common; of the moved
    # square's left edge (columns 14-15) and the other's right edge (28-29) the inner rows of the other's core are not.
    assert (found.boundary_intersection, found.boundary_union) == (64, 224)
    assert scored([1], (moved, square, 1)).result()["boundary_iou"] == pytest.approx(64 / 224)
    assert count(moved, square.astype(np.uint8), boundary=False)[4:6] == (0, 0)
