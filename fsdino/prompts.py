"""What the support set tells the decoder (Sec. 3.4.1): prototype, semantic visual prompt, similarity map."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-6


def mask_to_grid(mask: Float[Tensor, "b h w"], grid: int) -> Float[Tensor, "b grid grid"]:
    """Average-pool a 0/1 mask to the grid: the share of each position that is foreground, in [0, 1].

    Never nearest: an object smaller than a cell keeps a positive weight.
    """
    return F.adaptive_avg_pool2d(mask[:, None], grid)[:, 0]


def masked_mean(features: Float[Tensor, "b c h w"], weights: Float[Tensor, "b h w"]) -> Float[Tensor, "b c"]:
    """Mean over positions, weighted by `weights` in [0, 1] (Eq. 2, read as the mean over the class, see the design)."""
    total = weights.sum((-2, -1)).clamp_min(EPS)
    return (features * weights[:, None]).sum((-2, -1)) / total[:, None]


def prototype_similarity(prototype: Float[Tensor, "b c"], query: Float[Tensor, "b c g g"]) -> Float[Tensor, "b 1 g g"]:
    """PCS: cosine of the prototype with every query position, in [-1, 1] (Eq. 2)."""
    return (F.normalize(query, dim=1) * F.normalize(prototype, dim=1)[..., None, None]).sum(1, keepdim=True)


def contrast_prototype(
    features: Float[Tensor, "b c h w"], weights: Float[Tensor, "b h w"], rest: Float[Tensor, "b h w"] | None = None
) -> Float[Tensor, "b c"]:
    """Direction from the background's prototype to the foreground's, both of unit length: a query position has a
    positive cosine with it exactly if it resembles the object more than the object's surroundings.

    `rest` is the share of each position that is background; all that is not foreground by default.
    """
    foreground, background = (
        masked_mean(features, weights),
        masked_mean(features, 1 - weights if rest is None else rest),
    )
    return F.normalize(foreground, dim=1) - F.normalize(background, dim=1)


def to_unit_scale(similarity: Float[Tensor, "b 1 g g"], centre: bool) -> Float[Tensor, "b 1 g g"]:
    """The map with mean square 1 within each image, its mean taken off first if `centre`.

    Cosines with one prototype differ by little, about a mean that tells of the image rather than of the class.
    A constant map becomes 0 if centred.
    """
    if centre:
        similarity = similarity - similarity.mean((-2, -1), keepdim=True)
    return similarity / similarity.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-4)


class SemanticVisualPrompt(nn.Module):
    """SVP: a 1x1 convolution to the decoder's width, then the masked mean: one sparse token. 196,864 parameters."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.project = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, late: Float[Tensor, "b c g g"], weights: Float[Tensor, "b g g"]) -> Float[Tensor, "b 1 e"]:
        """The prompt token of each support image."""
        return masked_mean(self.project(late), weights)[:, None]
