"""Classes of a user's own: photographs with masks, read and checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fsdino.data.masks import read_mask
from fsdino.errors import UserError
from fsdino.preprocess import read_image

if TYPE_CHECKING:
    import numpy as np


def read_masks(supports: Sequence[str], masks: Sequence[str], value: int | None) -> "list[np.ndarray]":
    """Masks of photographs. Raises UserError, naming the flag, if there are none or one lacks the other."""
    if not supports:
        raise UserError("--support: expected at least one photograph, got none")
    if len(supports) != len(masks):
        raise UserError(f"--mask: expected one mask for each of the {len(supports)} supports, got {len(masks)}")
    sizes = [read_image(path).size for path in supports]
    return [read_mask(path, size, value) for path, size in zip(masks, sizes, strict=True)]
