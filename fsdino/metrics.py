"""mIoU and FB-IoU as the field counts them: sums over all episodes first, ratios last."""

import numpy as np
from jaxtyping import Bool, UInt8

from fsdino import paper


class FewShotScore:
    """Intersections and unions per class, in int64, over any number of episodes.

    mIoU is the mean over classes of summed intersection / summed union of the foreground; FB-IoU the mean of the same
    ratio for foreground and background, all classes together. A class without an episode has no say.
    """

    def __init__(self, class_ids: list[int]):
        self.class_ids = list(class_ids)
        self.intersection = np.zeros((len(class_ids), 2), np.int64)  # columns: background, foreground
        self.union = np.zeros((len(class_ids), 2), np.int64)

    def add(self, prediction: Bool[np.ndarray, "h w"], label: UInt8[np.ndarray, "h w"], class_id: int) -> None:
        """Count one episode. `label` is 1 on the class, 0 elsewhere, 255 where nothing is scored."""
        row = self.class_ids.index(class_id)
        valid = label != paper.VOID
        for column, (guess, truth) in enumerate(((~prediction, label == 0), (prediction, label == 1))):
            self.intersection[row, column] += np.count_nonzero(guess & truth)
            self.union[row, column] += np.count_nonzero((guess | truth) & valid)

    def result(self) -> dict:
        """`miou`, `fb_iou` in [0, 1] and `per_class` (class id to IoU; classes never asked for are absent)."""
        seen = self.union.sum(1) > 0
        per_class = {
            class_id: float(i / max(u, 1))
            for class_id, i, u, ok in zip(self.class_ids, self.intersection[:, 1], self.union[:, 1], seen, strict=True)
            if ok
        }
        both = self.intersection.sum(0) / np.maximum(self.union.sum(0), 1)
        miou = float(np.mean(list(per_class.values()))) if per_class else 0.0
        return {"miou": miou, "fb_iou": float(both.mean()), "per_class": per_class}
