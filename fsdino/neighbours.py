"""What the support positions nearest to each query position say of it, and what the query then says of itself.

Not in the paper: a departure that pays (docs/method.md). Every map here depends on similarities alone, never on what
the features are, so that nothing in it can memorise the base classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino.baselines import TOP_K
from fsdino.prompts import EPS

WIDTH = 128  # channels between the convolutions
TEMPERATURE = 0.05  # of the votes, to begin with; learnt for each group
MAPS = 4  # for each group of channels


class Annotated(NamedTuple):
    """Positions of all supports of a class, in one row: n = shots x g^2."""

    features: Float[Tensor, "b c n"]
    """Of unit length within each group of channels."""
    foreground: Float[Tensor, "b n"]
    """Share of each position that shows the class."""
    background: Float[Tensor, "b n"]
    """Share that shows something else; the rest is void."""


def padded(positions: Sequence[Annotated]) -> Annotated:
    """Classes with different numbers of shots as one batch; void positions pad those with fewer."""
    most = max(one.foreground.shape[-1] for one in positions)
    parts = zip(*([F.pad(x, (0, most - x.shape[-1])) for x in one] for one in positions), strict=True)
    return Annotated(*(torch.cat(part) for part in parts))


class NeighbourPrior(nn.Module):
    """Prior logits from the supports' nearest positions, in each group of the features' channels (stages of a CNN).

    Four maps for each group: a vote of all support positions, weighted by a softmax over their cosines, as in DCAMA;
    the mean cosine of the five nearest positions of the class less that of the five nearest of its background; the
    former alone, stretched to [-1, 1] within the image, as in PFENet; and the cosine with the direction from the
    background's prototype to the foreground's. Three convolutions make logits of them.

    With `self_support`, the query's own positions then correct the logits: each votes for those that resemble it, and
    prototypes of what is probably the class and probably not are compared with every position (SSP, arXiv 2207.11549).
    """

    def __init__(self, groups: Sequence[int], self_support: bool):
        super().__init__()
        self.groups, self.self_support = tuple(groups), self_support
        count = len(self.groups)
        self.log_temperature = nn.Parameter(torch.full((count,), math.log(TEMPERATURE)))
        self.vote_scale = nn.Parameter(torch.tensor(5.0))
        self.first, self.second = _convolution(MAPS * count), _convolution(WIDTH)
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)
        nn.init.normal_(self.last.weight, std=0.1 / math.sqrt(9 * WIDTH))
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        if self_support:
            self.own_log_temperature = nn.Parameter(torch.full((count,), math.log(TEMPERATURE)))
            self.own_first, self.own_last = _convolution(2 * count + 1 + WIDTH), nn.Conv2d(WIDTH, 1, 3, padding=1)
            nn.init.zeros_(self.own_last.weight)
            nn.init.zeros_(self.own_last.bias)  # type: ignore[arg-type]

    def annotated(
        self,
        late: Float[Tensor, "b k c g g"],
        foreground: Float[Tensor, "b k g g"],
        background: Float[Tensor, "b k g g"],
    ) -> Annotated:
        """The positions of K supports of B classes."""
        unit = torch.cat(self._unit(late.transpose(1, 2).flatten(2)), 1)
        return Annotated(unit, foreground.flatten(1), background.flatten(1))

    def forward(
        self, support: Annotated, query: Float[Tensor, "b c g g"], direct: Float[Tensor, "b 1 m m"]
    ) -> Float[Tensor, "b 1 g g"]:
        """Logits on the grid; `direct` are those of the other prompts, which the query's own vote takes in."""
        grid = (query.shape[-2], query.shape[-1])
        with torch.autocast(query.device.type, enabled=False):  # halves round cosines as coarsely as they differ
            own = self._unit(query.float().flatten(2))
            of_support = support.features.float().split(self.groups, 1)
            of_groups = [
                of_group
                for x, s, temperature in zip(own, of_support, self.log_temperature.exp(), strict=True)
                for of_group in _neighbour_maps(x, s, support.foreground, support.background, temperature)
            ]
        maps = torch.stack(of_groups, 1).unflatten(2, grid)
        hidden = F.relu(self.second(F.relu(self.first(maps))))
        logits = self.last(hidden) + self.vote_scale * maps[:, ::MAPS].mean(1, keepdim=True)
        if not self.self_support:
            return logits
        before = logits + F.adaptive_avg_pool2d(direct, grid)
        probability = before.float().sigmoid()
        with torch.autocast(query.device.type, enabled=False):
            own_maps = [
                of_group.unflatten(2, grid)
                for x, temperature in zip(own, self.own_log_temperature.exp(), strict=True)
                for of_group in _own_maps(x, probability.flatten(2), temperature)
            ]
        evidence = torch.cat([*own_maps, before.clamp(-8, 8) / 4, hidden], 1)
        return logits + self.own_last(F.relu(self.own_first(evidence)))

    def _unit(self, x: Float[Tensor, "b c n"]) -> list[Float[Tensor, "b _ n"]]:
        return [F.normalize(group, dim=1) for group in x.split(self.groups, 1)]


def _neighbour_maps(
    query: Float[Tensor, "b c q"],
    support: Float[Tensor, "b c n"],
    foreground: Float[Tensor, "b n"],
    background: Float[Tensor, "b n"],
    temperature: Float[Tensor, ""],
) -> list[Float[Tensor, "b q"]]:
    """The four maps of one group of channels, each of a scale of about 1."""
    cosine = query.transpose(1, 2) @ support
    known = foreground + background
    share = torch.softmax(cosine / temperature, 2) @ torch.stack([foreground, known], 2)
    vote = share[..., 0] / share[..., 1].clamp_min(EPS) - 0.5
    inside, outside = (nearest(cosine, weights, known) for weights in (foreground, background))
    low, high = inside.amin(1, keepdim=True), inside.amax(1, keepdim=True)
    stretched = 2 * (inside - low) / (high - low).clamp_min(1e-4) - 1
    return [4 * vote, 10 * (inside - outside), stretched, 5 * _contrast(query, support, foreground, background)]


def nearest(
    cosine: Float[Tensor, "b q n"], weights: Float[Tensor, "b n"], known: Float[Tensor, "b n"]
) -> Float[Tensor, "b q"]:
    """Mean of the five largest cosines with positions that `weights` covers by at least half or, where there are fewer,
    with the five that it covers most."""
    count = min(TOP_K, weights.shape[1])
    most = weights.masked_fill(known == 0, -1).topk(count, 1).indices
    allowed = (weights >= 0.5).scatter(1, most, True)
    return cosine.masked_fill(~allowed[:, None], -2).topk(count, 2).values.mean(2)


def _own_maps(
    query: Float[Tensor, "b c n"], probability: Float[Tensor, "b 1 n"], temperature: Float[Tensor, ""]
) -> list[Float[Tensor, "b 1 n"]]:
    """Cosine with the direction from what is probably not the class to what probably is, and the positions' vote."""
    surely, surely_not = probability[:, 0].square(), (1 - probability[:, 0]).square()
    contrast = _contrast(query, query, surely, surely_not)[:, None]
    attention = torch.softmax(query.transpose(1, 2) @ query / temperature, 2)
    vote = (attention @ probability.transpose(1, 2)).transpose(1, 2) - 0.5
    return [5 * contrast, 4 * vote]


def _contrast(
    query: Float[Tensor, "b c q"],
    support: Float[Tensor, "b c n"],
    foreground: Float[Tensor, "b n"],
    background: Float[Tensor, "b n"],
) -> Float[Tensor, "b q"]:
    """Cosine with `prompts.contrast_prototype`, for a query of unit length, without a copy of either."""
    of_class, of_rest = (
        F.normalize((support @ weights[..., None])[..., 0], dim=1) for weights in (foreground, background)
    )
    return (F.normalize(of_class - of_rest, dim=1)[:, None] @ query)[:, 0]


def _convolution(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, WIDTH, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution
