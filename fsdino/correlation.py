"""Support-query 4D correlation (Sec. 3.4.1, Eq. 3-5) without ever forming the g^2 x g^2 tensor.

The first convolution is linear over support positions, so with W its weight and F_s, F_q the normalised features
`W (F_q F_s^T)^T = (W F_s) F_q^T`. `W F_s` is the *kernel* of a support image: small, made once, averaged over shots.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import paper
from fsdino.prompts import EPS, to_unit_scale


class CorrelationPrior(nn.Module):
    """Correlation of masked support and query, aggregated along both, decoded to a prior mask of 4x the grid.

    Cosines (Eq. 3, with the support masked as HSNet does) are reduced 1x1 over the support positions and 3x3 with
    stride 2 over the query's; then a depthwise 3x3 works where the query axes are spatial (Eq. 4) and a pointwise
    convolution where they are channels (Eq. 5). The similarity map is added to every channel. 3,923,966 parameters
    at grid 37. The head convolves before each bilinear step, which costs a quarter of convolving after it.

    The paper names no activations; ours are ReLU. `support_weights`, `similarity` and `start` are switches of
    SegmenterConfig, as are `contrast`, which lets the support's background weigh against its foreground, and `small`
    (`refine` there), which starts the logits at a tenth, as a correction to something rather than the whole.

    Support and query may come on any grid: other ones than the trained `grid` are resampled to it, the support's
    features before the correlation, the query's correlation after its first reduction.
    """

    def __init__(
        self,
        grid: int,
        channels: int = paper.CORRELATION_CHANNELS,
        contrast: bool = False,
        small: bool = False,
        support_weights: Literal["mask", "share"] = "mask",
        similarity: Literal["cosine", "unit"] = "cosine",
        start: Literal["pytorch", "he"] = "he",
    ):
        super().__init__()
        self.grid, self.contrast = grid, contrast
        self.support_weights, self.similarity = support_weights, similarity
        self.reduced_grid = math.ceil(grid / 2)
        positions = self.reduced_grid**2
        wide, mid = paper.PRIOR_HEAD_WIDTHS
        self.support_reduce = nn.Conv2d(grid**2, channels, 1)
        self.query_reduce = nn.Conv2d(channels, positions, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(positions, positions, 3, padding=1, groups=positions)
        self.pointwise = nn.Conv2d(positions, positions, 1)
        self.head = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((positions, wide), (wide, mid), (mid, 1)))
        for conv in (self.support_reduce, self.query_reduce, self.depthwise, self.pointwise, *self.head):
            assert isinstance(conv, nn.Conv2d)
            if start == "he":
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear" if conv is self.head[-1] else "relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            if small and conv is self.head[-1]:
                nn.init.normal_(conv.weight, std=0.1 / math.sqrt(9 * mid))

    def kernel(
        self,
        late: Float[Tensor, "b c g g"],
        weights: Float[Tensor, "b g g"],
        rest: Float[Tensor, "b g g"] | None = None,
    ) -> Float[Tensor, "b k c"]:
        """`W F_s` of one support image each; the mean over shots is the kernel of the shots together."""
        late, weights = _to_grid(late, self.grid), _to_grid(weights[:, None], self.grid)[:, 0]
        rest = rest if rest is None else _to_grid(rest[:, None], self.grid)[:, 0]
        scale = (self.position_weights(weights, rest) * _inverse_norm(late)).flatten(1)
        weight = self.support_reduce.weight[:, :, 0, 0] * scale[:, None]  # smaller than the features it scales
        return torch.einsum("bkp,bcp->bkc", weight, late.flatten(2))

    def position_weights(
        self, weights: Float[Tensor, "b g g"], rest: Float[Tensor, "b g g"] | None = None
    ) -> Float[Tensor, "b g g"]:
        """How much each support position counts: as the mask says (Eq. 3), or, as shares, with a total of g^2 / 4
        whatever the object's size. With `contrast`, less the same of the background: `rest`, or all but the mask."""

        def scaled(x: Tensor) -> Tensor:
            if self.support_weights == "mask":
                return x
            return x / x.sum((-2, -1), keepdim=True).clamp_min(EPS)

        rest = 1 - weights if rest is None else rest
        counted = scaled(weights) - scaled(rest) if self.contrast else scaled(weights)
        return counted if self.support_weights == "mask" else counted * self.grid**2 / 4

    def forward(
        self,
        kernel: Float[Tensor, "b k c"],
        query: Float[Tensor, "b c g g"],
        similarity: Float[Tensor, "b 1 g g"],
    ) -> Float[Tensor, "b 1 m m"]:
        """Prior logits with m = 4g."""
        return self.decode(self.reduced(kernel, query), similarity)

    def reduced(self, kernel: Float[Tensor, "b k c"], query: Float[Tensor, "b c h h"]) -> Float[Tensor, "b k g g"]:
        """The correlation after the first convolution. Norms are divided out last: no copy of the query is made."""
        scale = _inverse_norm(query)[:, None]
        product = torch.einsum("bkc,bcp->bkp", kernel, query.flatten(2)).unflatten(2, query.shape[-2:])
        bias = self.support_reduce.bias
        assert bias is not None
        return F.relu(_to_grid(product * scale, self.grid) + bias[:, None, None])

    def decode(
        self, reduced: Float[Tensor, "b k g g"], similarity: Float[Tensor, "b 1 q q"]
    ) -> Float[Tensor, "b 1 m m"]:
        """Everything after the first convolution, with m = 4q; shared by the fused form and by its plain reference."""
        evidence = similarity
        if self.similarity == "unit":
            evidence = to_unit_scale(similarity, centre=not self.contrast)
        s1 = F.relu(self.query_reduce(reduced))  # b (support positions) h h
        h = self.reduced_grid
        s2 = s1.flatten(2).transpose(1, 2).unflatten(2, (h, h))  # b (query positions) h h, support axes spatial
        along_support = self.pointwise(s2).flatten(2).transpose(1, 2).unflatten(2, (h, h))
        x = self.depthwise(s1) + along_support + F.adaptive_avg_pool2d(evidence, h)
        for conv, side in zip(self.head[:-1], (self.grid, 2 * self.grid), strict=True):
            x = F.relu(conv(x))
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        x = self.head[-1](x)
        side = paper.PRIOR_UPSCALE * similarity.shape[-1]
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def _inverse_norm(x: Float[Tensor, "b c h h"]) -> Float[Tensor, "b h h"]:
    """1 / |x| over channels, bounded as in F.normalize; at least in float32, as squares of halves overflow."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.square().sum(1).clamp_min(1e-24).rsqrt().to(x.dtype)


def _to_grid(x: Float[Tensor, "b c h h"], grid: int) -> Float[Tensor, "b c g g"]:
    """The map itself, or resampled to another grid, bilinear with antialiasing."""
    if x.shape[-1] == grid:
        return x
    return F.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
