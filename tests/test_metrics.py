import numpy as np
import pytest

from fsdino.metrics import FewShotScore


def test_scores_are_ratios_of_sums_as_computed_by_hand():
    score = FewShotScore([3, 7])
    score.add(np.array([[True, True, False, False]]), np.array([[1, 0, 1, 0]], np.uint8), 3)  # I 1, U 3; bg I 1, U 3
    score.add(np.array([[True, True, True, False]]), np.array([[1, 1, 1, 0]], np.uint8), 3)  # I 3, U 3; bg I 1, U 1
    score.add(np.array([[False, True, False, False]]), np.array([[0, 1, 1, 1]], np.uint8), 7)  # I 1, U 3; bg I 1, U 3
    result = score.result()
    assert result["per_class"] == {3: pytest.approx(4 / 6), 7: pytest.approx(1 / 3)}
    assert result["miou"] == pytest.approx((4 / 6 + 1 / 3) / 2)
    assert result["fb_iou"] == pytest.approx((5 / 9 + 3 / 7) / 2)


def test_void_pixels_are_not_scored():
    score = FewShotScore([1])
    score.add(np.array([[True, True, False]]), np.array([[1, 255, 255]], np.uint8), 1)
    assert score.result()["miou"] == 1.0
    assert score.union.tolist() == [[0, 1]]


def test_a_class_without_an_episode_has_no_say():
    score = FewShotScore([1, 2])
    score.add(np.array([[True]]), np.array([[1]], np.uint8), 1)
    assert score.result() == {"miou": 1.0, "fb_iou": 0.5, "per_class": {1: 1.0}}


def test_sums_are_of_64_bits():
    assert FewShotScore([1]).union.dtype == np.int64
