"""J and F of the DAVIS benchmark, for one object over a video, and how several objects share the pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt

BOUND_SHARE = 0.008  # of the diagonal: how far a boundary may be off
BINS = 4


class Statistics(NamedTuple):
    """Of a measure over the frames of a video."""

    mean: float
    recall: float
    """Share of frames above one half."""
    decay: float
    """Mean of the first quarter of frames minus that of the last."""


def jaccard(prediction: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """J, region similarity: intersection over union; 1 if both are empty."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_f(prediction: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """F, contour accuracy: the F1 of boundary pixels that lie within 0.8 % of the diagonal (rounded up) of the other
    boundary; 1 if neither mask has one."""
    reach = np.ceil(BOUND_SHARE * np.hypot(*truth.shape))
    guessed, drawn = outline(prediction), outline(truth)
    if not guessed.any() or not drawn.any():
        return float(guessed.any() == drawn.any())
    precision = float(np.mean(_distance(drawn)[guessed] <= reach))
    recall = float(np.mean(_distance(guessed)[drawn] <= reach))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that differ from their right, lower, or lower right neighbour."""
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != around[:-1, 1:]) | (mask != around[1:, :-1]) | (mask != around[1:, 1:])


def statistics(values: Sequence[float]) -> Statistics:
    """Mean, recall and decay of a measure; frames are split into quarters that share their ends, as published."""
    series = np.asarray(values, float)
    ends = np.round(np.linspace(1, len(series), BINS + 1) + 1e-10).astype(int) - 1
    first, last = series[ends[0] : ends[1] + 1], series[ends[-2] : ends[-1] + 1]
    return Statistics(float(series.mean()), float(np.mean(series > 0.5)), float(first.mean() - last.mean()))


def share_pixels(logits: Float[np.ndarray, "n h w"]) -> Int[np.ndarray, "h w"]:
    """Which of n objects each pixel is, from 1; 0, the background, where no logit is above 0."""
    best = logits.argmax(0)
    return np.where(logits.max(0) > 0, best + 1, 0)


def _distance(boundary: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Distance of each pixel to the boundary, in pixels."""
    return distance_transform_edt(~boundary)
