"""Whether a query shows the class at all, from how alike what was found is to what the supports show."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino.neighbours import Annotated, nearest
from fsdino.prompts import EPS

OF_GROUP = 5
OF_MASK = 2
LEAD = 4.0
"""How much the presence of classes weighs where they are told apart, in logits of a pixel per log-odds; chosen on base
classes (docs/results/README.md)."""


class Presence(nn.Module):
    """A logistic regression on `evidence`: the probability that the query shows the class, and the threshold below
    which its mask is to be empty.

    Nothing here is trained by gradients: pipelines/presence_fit.py fits it when the segmenter is trained. Until then
    every class is present.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor

    def __init__(self, groups: int):
        super().__init__()
        inputs = OF_GROUP * groups + OF_MASK
        for name, value in (("mean", 0.0), ("deviation", 1.0), ("weight", 0.0)):
            self.register_buffer(name, torch.full((inputs,), value))
        self.register_buffer("bias", torch.tensor(10.0))
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, evidence: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
        """Probabilities."""
        standard = (evidence - self.mean) / self.deviation
        return (standard @ self.weight + self.bias).sigmoid()


def lag(presence: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """By how much the logits of n classes in one image are lowered before they are compared: LEAD times the log-odds of
    presence that a class is behind the most probable one. By themselves they do not compare, as each class's supports
    find whatever is most like them."""
    odds = presence.double().logit(1e-6)
    return (LEAD * (odds.amax(-1, keepdim=True) - odds)).float()


@torch.no_grad()
def evidence(
    groups: tuple[int, ...],
    support: Annotated,
    query: Float[Tensor, "b c g g"],
    mask_logits: Float[Tensor, "b 1 m m"],
) -> Float[Tensor, "b n"]:
    """For each group of channels: the largest cosine of any query position with the supports' nearest five, the mean of
    these over the mask, how well the supports' positions are found again within the mask, and the cosines of the mask's
    mean with the means of class and background. Then how sure the mask is of itself, and its size."""
    with torch.autocast(query.device.type, enabled=False):
        probability = F.adaptive_avg_pool2d(mask_logits.float(), query.shape[-1]).sigmoid().flatten(1)
        inside = probability / probability.sum(1, keepdim=True).clamp_min(EPS)
        known = support.foreground + support.background
        columns = []
        of_query = query.float().flatten(2).split(groups, 1)
        for x, s in zip(of_query, support.features.float().split(groups, 1), strict=True):
            x = F.normalize(x, dim=1)
            cosine = x.transpose(1, 2) @ s
            alike = nearest(cosine, support.foreground, known)
            again = cosine.masked_fill((probability < 0.5)[..., None], -1).amax(1)
            found, of_class, of_rest = (
                F.normalize((features @ weights[..., None])[..., 0], dim=1)
                for features, weights in ((x, inside), (s, support.foreground), (s, support.background))
            )
            columns += [
                alike.amax(1),
                (alike * inside).sum(1),
                (again * support.foreground).sum(1) / support.foreground.sum(1).clamp_min(EPS),
                (found * of_class).sum(1),
                (found * of_rest).sum(1),
            ]
        columns += [(probability * inside).sum(1), probability.mean(1).clamp_min(EPS).log()]
        return torch.stack(columns, 1)
