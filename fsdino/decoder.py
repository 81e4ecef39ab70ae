"""SAM's mask decoder and mask downscaling for batches of pairs on any grid, under SAM's own key names.

segment-anything's decoder repeats one image embedding for every prompt, so it cannot take a batch of (image, prompt)
pairs; ours takes one embedding per prompt. The transformer and the small blocks are segment-anything's own.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import paper
from fsdino.lean import sam_modeling

_sam = sam_modeling()
LayerNorm2d, MLP, TwoWayTransformer = _sam.common.LayerNorm2d, _sam.mask_decoder.MLP, _sam.TwoWayTransformer


class PositionalEncoding(nn.Module):
    """SAM's random Fourier features with a learnable Gaussian matrix (Sec. 3.4.2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gaussian = nn.Parameter(torch.randn(2, channels // 2))

    def forward(self, grid: int) -> Float[Tensor, "1 e g g"]:
        """Encoding of the cell centres, x before y, coordinates in [-1, 1]."""
        centres = (torch.arange(grid, device=self.gaussian.device, dtype=self.gaussian.dtype) + 0.5) / grid * 2 - 1
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        angle = 2 * math.pi * (torch.stack([x, y], dim=-1) @ self.gaussian)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).permute(2, 0, 1)[None]


def mask_downscaling(channels: int, hidden: int = paper.SAM_MASK_CHANNELS) -> nn.Sequential:
    """SAM's prompt_encoder.mask_downscaling: `b 1 4g 4g` logits to a `b e g g` dense prompt. 4,684 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, hidden // 4, 2, stride=2),
        LayerNorm2d(hidden // 4),
        nn.GELU(),
        nn.Conv2d(hidden // 4, hidden, 2, stride=2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.Conv2d(hidden, channels, 1),
    )


class _Smooth(nn.Sequential):
    """A 3x3 convolution, then bilinear enlargement: without the chequered pattern of untrained transposed
    convolutions."""

    def __init__(self, in_channels: int, out_channels: int, _: int, stride: int):
        enlarge = nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=False)
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1), enlarge)


class MaskDecoder(nn.Module):
    """One mask per (embedding, prompt) pair. 4,058,340 parameters with SAM's extras, 3,505,536 without.

    The extras are what `multimask_output=False` never shows: the IoU head and three more mask tokens. The tokens
    still take part in attention, so a checkpoint of SAM is only reproduced exactly with them; without a checkpoint
    they are dead weight.
    """

    def __init__(
        self,
        channels: int = paper.EMBEDDING_CHANNELS,
        depth: int = paper.SAM_DECODER_DEPTH,
        heads: int = paper.SAM_DECODER_HEADS,
        mlp_dim: int = paper.SAM_DECODER_MLP,
        sam_extras: bool = True,
        upscaling: Literal["transposed", "bilinear"] = "transposed",
    ):
        super().__init__()
        num_masks = 4 if sam_extras else 1
        self.transformer = TwoWayTransformer(depth=depth, embedding_dim=channels, num_heads=heads, mlp_dim=mlp_dim)
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(num_masks, channels)
        enlarge = nn.ConvTranspose2d if upscaling == "transposed" else _Smooth
        self.output_upscaling = nn.Sequential(
            enlarge(channels, channels // 4, 2, stride=2),
            LayerNorm2d(channels // 4),
            nn.GELU(),
            enlarge(channels // 4, channels // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(channels, channels, channels // 8, 3) for _ in range(num_masks)
        )
        if sam_extras:
            self.iou_prediction_head = MLP(channels, 256, num_masks, 3)
            # Kept for SAM's file format alone; no loss reaches them, so no optimiser may decay them.
            self.iou_prediction_head.requires_grad_(False)
            self.output_hypernetworks_mlps[1:].requires_grad_(False)

    def forward(
        self,
        embedding: Float[Tensor, "b e g g"],
        encoding: Float[Tensor, "1 e g g"],
        sparse: Float[Tensor, "b t e"],
        dense: Float[Tensor, "b e g g"],
    ) -> Float[Tensor, "b 1 m m"]:
        """Mask logits with m = 4g; `t` may be 0 (SAM's empty prompt)."""
        batch, grid = embedding.shape[0], embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, -1, -1)
        tokens = torch.cat([own, sparse.to(own.dtype)], dim=1)
        out, image = self.transformer(embedding + dense, encoding.expand(batch, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, grid))
        weights = self.output_hypernetworks_mlps[0](out[:, 1])
        return torch.einsum("be,behw->bhw", weights, upscaled)[:, None]
