"""mIoU, FB-IoU and boundary IoU as the field counts them: sums over all episodes first, ratios last."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from fsdino import paper

BOUNDARY_SHARE = 0.02  # of the image's diagonal (Cheng et al., Boundary IoU, 2021)


class Counts(NamedTuple):
    """Pixels of one episode, or of many, by which it is scored."""

    background_intersection: int
    background_union: int
    intersection: int
    union: int
    boundary_intersection: int
    boundary_union: int
    predicted: int
    """Of the foreground that was predicted where something is scored."""

    @property
    def iou(self) -> float:
        """Of the foreground; 1 if neither prediction nor label has any."""
        return self.intersection / self.union if self.union else 1.0


def count(
    prediction: Bool[np.ndarray, "h w"],
    label: UInt8[np.ndarray, "h w"],
    boundary: bool = True,
    drawn: Bool[np.ndarray, "h w"] | None = None,
) -> Counts:
    """One episode. `label` is 1 on the class, 0 elsewhere, 255 where nothing is scored; without `boundary` its counts
    are 0. `drawn` is the label's own boundary, where that is known already."""
    valid = label != paper.VOID
    guess, truth = prediction & valid, label == 1
    intersection, predicted, true = (int(np.count_nonzero(x)) for x in (guess & truth, guess, truth))
    union, pixels = predicted + true - intersection, int(np.count_nonzero(valid))
    edges = (0, 0)
    if boundary and union:
        guessed, drawn = boundary_of(guess), boundary_of(truth) if drawn is None else drawn
        edges = (int(np.count_nonzero(guessed & drawn)), int(np.count_nonzero(guessed | drawn)))
    return Counts(pixels - union, pixels - intersection, intersection, union, *edges, predicted)


def boundary_of(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels of a mask within 2 % of the image's diagonal from its outline, or from the image's edge.

    As published: an erosion by 3x3 as often as that is pixels, the outside of the image being background.
    """
    reach = max(1, round(BOUNDARY_SHARE * float(np.hypot(*mask.shape))))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    edge = np.zeros_like(mask)
    if len(rows):
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # the erosion reaches no further
        edge[window] = mask[window] & ~_eroded(mask[window], reach)
    return edge


def _eroded(mask: np.ndarray, reach: int) -> np.ndarray:
    """Pixels whose square of 2 reach + 1 lies in the mask: along each axis, runs are joined to ever longer ones."""
    for _ in range(2):
        mask, length = np.pad(mask, ((reach, reach), (0, 0))), 1
        while length < 2 * reach + 1:
            step = min(length, 2 * reach + 1 - length)
            mask, length = mask[:-step] & mask[step:], length + step
        mask = mask.T
    return mask


class FewShotScore:
    """Intersections and unions per class, in int64, over any number of episodes.

    mIoU is the mean over classes of summed intersection / summed union of the foreground; FB-IoU the mean of the same
    ratio for foreground and background, all classes together. A class without an episode has no say.
    """

    def __init__(self, class_ids: Iterable[int]):
        self.sums = {class_id: np.zeros(len(Counts._fields), np.int64) for class_id in class_ids}
        self.episodes = dict.fromkeys(self.sums, 0)

    def add(self, counts: Counts, class_id: int) -> None:
        """One episode."""
        self.sums[class_id] += np.array(counts, np.int64)
        self.episodes[class_id] += 1

    def result(self) -> dict:
        """`miou`, `fb_iou` and `boundary_iou` in [0, 1], and `per_class` (class id to IoU; classes never asked for are
        absent)."""
        asked = {class_id: Counts(*sums.tolist()) for class_id, sums in self.sums.items() if self.episodes[class_id]}
        total = Counts(*np.sum([*asked.values()], axis=0).tolist()) if asked else Counts(*[0] * len(Counts._fields))
        ious = [
            total.background_intersection / max(total.background_union, 1),
            total.intersection / max(total.union, 1),
        ]
        edges = [c.boundary_intersection / max(c.boundary_union, 1) for c in asked.values()]
        per_class = {class_id: c.intersection / max(c.union, 1) for class_id, c in asked.items()}
        return {
            "miou": float(np.mean(list(per_class.values()))) if per_class else 0.0,
            "fb_iou": float(np.mean(ious)),
            "boundary_iou": float(np.mean(edges)) if edges else 0.0,
            "per_class": per_class,
        }
