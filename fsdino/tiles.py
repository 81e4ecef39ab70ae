"""Photographs that are larger than what the network sees: overlapping tiles, blended, over a pass of the whole.

A square of 400 or 518 px shows a photograph of 24 megapixels at a tenth of its size, at which small objects vanish.
Tiles show them; the whole shows what a tile is a part of. Both have a say: the logits are the mean of the two.
"""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16
from torch import Tensor

from fsdino.errors import UserError


class Box(NamedTuple):
    """A tile's place in its photograph, in pixels."""

    top: int
    left: int
    height: int
    width: int


def boxes(height: int, width: int, side_px: int, overlap: float) -> list[Box]:
    """Tiles of a photograph, row by row: spread evenly, each sharing at least `overlap` of its side with the next.

    Raises UserError for a side below 32 px, or an overlap that is not in [0, 0.9].
    """
    if side_px < 32 or not 0 <= overlap <= 0.9:
        raise UserError(f"tiles of {side_px} px with overlap {overlap:g}: expected at least 32 px, and 0 to 0.9")
    tall, wide = min(height, side_px), min(width, side_px)
    return [
        Box(top, left, tall, wide) for top in _starts(height, tall, overlap) for left in _starts(width, wide, overlap)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    count = 1 + math.ceil((length - side) / (side * (1 - overlap)))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def blended(
    whole: Float[Tensor, "n m m"],
    height: int,
    width: int,
    tiles: Iterable[tuple[Box, Float[Tensor, "n t t"]]],
    overlap: float,
) -> Float16[Tensor, "n h w"]:
    """Logits of a photograph from those of the whole and of its tiles, which come row by row, on the CPU.

    A tile weighs less towards its edges, over the part that it shares, so that no seam is seen. What is in memory
    beside the result is a row of tiles high.
    """
    classes = len(whole)
    result = torch.empty(classes, height, width, dtype=torch.float16)
    sums, weights = torch.zeros(classes, 0, width), torch.zeros(0, width)
    begun = 0  # the row of pixels at which `sums` begins
    for top, row in groupby(tiles, key=lambda tile: tile[0].top):
        _finish(result, whole, begun, sums[:, : top - begun], weights[: top - begun])
        sums, weights, begun = sums[:, top - begun :], weights[top - begun :], top
        for box, logits in row:
            more = box.height - weights.shape[0]
            sums, weights = F.pad(sums, (0, 0, 0, more)), F.pad(weights, (0, 0, 0, more))
            large = F.interpolate(logits[None].float().cpu(), size=box[2:], mode="bilinear", align_corners=False)[0]
            weight = _ramp(box.height, overlap)[:, None] * _ramp(box.width, overlap)
            columns = slice(box.left, box.left + box.width)
            sums[:, :, columns] += large * weight
            weights[:, columns] += weight
    _finish(result, whole, begun, sums, weights)
    return result


def _finish(result: Tensor, whole: Tensor, top: int, sums: Tensor, weights: Tensor) -> None:
    """Rows that no further tile reaches."""
    rows = weights.shape[0]
    if rows:
        of_tiles = sums / weights
        result[:, top : top + rows] = (of_tiles + _rows_of(whole, top, rows, *result.shape[1:])) / 2


def _rows_of(whole: Tensor, top: int, rows: int, height: int, width: int) -> Tensor:
    """So many rows of the whole's logits at the photograph's size, bilinear."""
    y = (2 * (torch.arange(top, top + rows) + 0.5) / height - 1)[:, None].expand(rows, width)
    x = (2 * (torch.arange(width) + 0.5) / width - 1)[None].expand(rows, width)
    places = torch.stack([x, y], -1)[None]
    return F.grid_sample(whole[None].float().cpu(), places, "bilinear", "border", align_corners=False)[0]


def _ramp(side: int, overlap: float) -> Tensor:
    """1 inside, falling towards both ends over the part that is shared."""
    inside = torch.arange(side) + 0.5
    return (torch.minimum(inside, side - inside) / max(1.0, overlap * side)).clamp_max(1.0)
