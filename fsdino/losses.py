"""Dice and binary cross-entropy on prior and final mask (Eq. 6-8), void pixels left out."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from fsdino import paper


def mask_loss(
    logits: Float[Tensor, "b 1 m m"], label: UInt8[Tensor, "b h w"], pixels: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Dice + BCE of one mask. Labels are 0, 1 or 255 (void: in neither term); logits grow to the label's size.

    BCE is the sum over pixels that are not void, over `pixels`, or over their own number. Parts of a batch that are
    given the mean number of a part have the whole batch's loss as their mean, whatever their shares of void.
    """
    logits = F.interpolate(logits.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    valid = (label != paper.VOID).float()
    target = (label == 1).float()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (bce * valid).sum() / (valid.sum() if pixels is None else pixels).clamp_min(1)
    return bce + dice_loss(logits.sigmoid() * valid, target)


def dice_loss(probability: Float[Tensor, "b h w"], target: Float[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """1 - (2I + 1) / (P + T + 1), per pair, then the mean."""
    overlap = (probability * target).sum((-2, -1))
    total = probability.sum((-2, -1)) + target.sum((-2, -1))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def distillation_loss(student: Float[Tensor, "b e g g"], teacher: Float[Tensor, "b e t t"]) -> Float[Tensor, ""]:
    """MSE over all positions against the teacher, area-resized to the student's grid (Sec. 3.3.2)."""
    target = F.interpolate(teacher.float(), size=student.shape[-2:], mode="area")
    return torch.mean((student.float() - target) ** 2)
