"""Self-similarity of feature maps: which positions of an image a network sees as similar (Sec. 3.3.1, Fig. 2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def self_similarity(features: Float[Tensor, "b c g g"]) -> Float[Tensor, "b p p"]:
    """Cosines in [-1, 1] of every position with every other, p = g^2 in rows from the top left."""
    unit = F.normalize(features.flatten(2), dim=1)
    return unit.transpose(1, 2) @ unit


def agreement(one: Float[Tensor, "b c g g"], other: Float[Tensor, "b d h h"]) -> Float[Tensor, "b"]:
    """How similarly two networks see each image: Pearson's r of their self-similarities over all pairs of positions.

    Both are averaged down to the coarser of their grids first. 1: the same pairs are similar to both; 0: no relation.
    """
    grid = min(one.shape[-1], other.shape[-1])
    maps = [self_similarity(F.adaptive_avg_pool2d(features.float(), grid)) for features in (one, other)]
    above = torch.triu_indices(grid**2, grid**2, offset=1, device=one.device)
    first, second = (similarity[:, above[0], above[1]] for similarity in maps)
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True), dim=1)
