"""Training-free segmenters on the same features: what any trained one has to beat."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fsdino.prompts import EPS, contrast_prototype, mask_to_grid, masked_mean, prototype_similarity

TOP_K = 5


def prototype_logits(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"], query: Float[Tensor, "b c g g"]
) -> Float[Tensor, "b 1 g g"]:
    """The method's own similarity map (PCS, Eq. 2), stretched to [0, 1] within the image, minus one half.

    Minimum and maximum as in PFENet's prior mask: no fixed threshold on cosines fits all classes.
    """
    support, weights = _one_map(late, masks)
    similarity = prototype_similarity(masked_mean(support, weights), query)
    low, high = similarity.amin((-2, -1), keepdim=True), similarity.amax((-2, -1), keepdim=True)
    return (similarity - low) / (high - low).clamp_min(EPS) - 0.5


def two_prototype_logits(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"], query: Float[Tensor, "b c g g"]
) -> Float[Tensor, "b 1 g g"]:
    """Nearer to the foreground's prototype than to the background's (above 0), as in PANet."""
    support, weights = _one_map(late, masks)
    return prototype_similarity(contrast_prototype(support, weights), query)


def nearest_logits(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"], query: Float[Tensor, "b c g g"]
) -> Float[Tensor, "b 1 g g"]:
    """Mean cosine of the five nearest foreground positions minus that of the five nearest background positions.

    A support position is foreground where the mask covers half of it; at least five count on either side, those
    with most (least) of it.
    """
    support, soft = _one_map(late, masks)
    weights = soft[:, 0]
    cosine = torch.einsum("bcq,bcs->bqs", F.normalize(query, dim=1).flatten(2), F.normalize(support[:, :, 0], dim=1))
    order = weights.argsort(1)
    foreground = (weights >= 0.5).scatter(1, order[:, -TOP_K:], True)
    background = (weights < 0.5).scatter(1, order[:, :TOP_K], True)

    def nearest(allowed: Tensor) -> Tensor:
        return cosine.masked_fill(~allowed[:, None], -2).topk(TOP_K, dim=2).values.mean(2)

    return (nearest(foreground) - nearest(background)).unflatten(1, query.shape[-2:])[:, None]


def _one_map(
    late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"]
) -> tuple[Float[Tensor, "b c 1 n"], Float[Tensor, "b 1 n"]]:
    """All shots as one long map of n = k g g positions, and their mask weights."""
    weights = mask_to_grid(masks.flatten(0, 1).to(late.dtype), late.shape[-1]).unflatten(0, masks.shape[:2])
    return late.transpose(1, 2).flatten(2)[:, :, None], weights.flatten(1)[:, None]
