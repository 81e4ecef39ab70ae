"""Labels and masks: which pixels are which class."""

import numpy as np
from jaxtyping import UInt8
from PIL import ImageOps

from fsdino import paper
from fsdino.errors import UserError
from fsdino.preprocess import Source, decoded


def read_label(path: Source) -> UInt8[np.ndarray, "h w"]:
    """A label PNG as class numbers; a palette image gives its indices. 255 is void.

    Raises UserError if the file is missing, unreadable, or has colour channels.
    """
    image = decoded(path)
    if image.mode not in ("P", "L", "1"):
        raise UserError(f"{path}: expected a label image of one channel, got mode {image.mode}; save it as greyscale")
    return np.array(image.convert("L") if image.mode == "1" else image, dtype=np.uint8)


def read_mask(path: Source, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """A support mask: every non-zero pixel is the object. `size` is the photograph's (width, height).

    Raises UserError if its size differs from the photograph's, or if no pixel is set.
    """
    image = ImageOps.exif_transpose(decoded(path))
    if image.size != size:
        raise UserError(
            f"{path}: expected a mask of the photograph's size {size[0]}x{size[1]}, "
            f"got {image.size[0]}x{image.size[1]}; draw the mask on that photograph"
        )
    # A palette's colours are names, not values: index 0 is the background whatever its colour.
    values = np.array(image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "CMYK") else image)
    mask = np.atleast_3d(values).any(-1)
    if not mask.any():
        raise UserError(
            f"{path}: expected at least one foreground pixel, got none; mark the object with a value above 0"
        )
    return np.asarray(mask, dtype=np.uint8)


def binary_label(label: UInt8[np.ndarray, "h w"], class_id: int) -> UInt8[np.ndarray, "h w"]:
    """1 on the class, 0 elsewhere, 255 where the label is void."""
    return np.where(label == paper.VOID, paper.VOID, label == class_id).astype(np.uint8)
