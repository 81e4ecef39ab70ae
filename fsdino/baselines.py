"""Training-free segmenters on the same features: what any trained one has to beat."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fsdino.prompts import mask_to_grid, masked_mean, prototype_similarity

TOP_K = 5


def prototype_logits(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"], query: Float[Tensor, "b c g g"]
) -> Float[Tensor, "b 1 g g"]:
    """Cosine with the foreground prototype minus cosine with the background prototype (above 0: the class).

    Each prototype is the masked mean over all shots, as in PANet.
    """
    weights = mask_to_grid(masks.flatten(0, 1).to(late.dtype), late.shape[-1]).unflatten(0, masks.shape[:2])
    support = late.transpose(1, 2).flatten(3).flatten(2)[..., None]  # b c (k g g) 1: one long map of all shots
    weights = weights.flatten(1)[..., None]
    foreground = prototype_similarity(masked_mean(support, weights), query)
    return foreground - prototype_similarity(masked_mean(support, 1 - weights), query)


def nearest_logits(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"], query: Float[Tensor, "b c g g"]
) -> Float[Tensor, "b 1 g g"]:
    """Mean cosine of the five nearest foreground positions minus that of the five nearest background positions.

    A support position is foreground where the mask covers half of it; at least five count on either side, those
    with most (least) of it.
    """
    weights = mask_to_grid(masks.flatten(0, 1).to(late.dtype), late.shape[-1]).unflatten(0, masks.shape[:2]).flatten(1)
    support = F.normalize(late.transpose(1, 2).flatten(2), dim=1)
    cosine = torch.einsum("bcq,bcs->bqs", F.normalize(query, dim=1).flatten(2), support)
    order = weights.argsort(1)
    foreground = (weights >= 0.5).scatter(1, order[:, -TOP_K:], True)
    background = (weights < 0.5).scatter(1, order[:, :TOP_K], True)

    def nearest(allowed: Tensor) -> Tensor:
        return cosine.masked_fill(~allowed[:, None], -2).topk(TOP_K, dim=2).values.mean(2)

    return (nearest(foreground) - nearest(background)).unflatten(1, query.shape[-2:])[:, None]
