"""Points, boxes and scribbles on a photograph as a mask: the marks are a support, and the photograph its own query.

What resembles the marked positions more than the rest is found as in any other photograph, twice: the second time with
the whole of the first mask for a support.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from fsdino import paper
from fsdino.errors import UserError
from fsdino.predictor import Predictor
from fsdino.preprocess import to_rgb

DISC_SHARE = 0.06  # radius of a point, of the photograph's shorter side: about a position of the network's grid
CORE_SHARE = 0.5  # of a box's sides: the ellipse in its middle that is surely the object
BORDER_SHARE = 0.03  # of the photograph's sides: where nothing else says what the background is
FAR_DISCS = 4  # radii that the border stays away from a point
ROUNDS = 2


class Point(NamedTuple):
    """In pixels of the photograph."""

    x: float
    y: float


class Frame(NamedTuple):
    """A box around the object, in pixels of the photograph: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Marks:
    """What is known of one object in one photograph."""

    points: Sequence[Point] = ()
    """On the object."""
    others: Sequence[Point] = ()
    """Beside it."""
    box: Frame | None = None
    scribble: UInt8[np.ndarray, "h w"] | None = None
    """1 on strokes over the object, 2 on strokes beside it, 0 elsewhere."""


def mask_of(predictor: Predictor, image: Image.Image, marks: Marks) -> Bool[np.ndarray, "h w"]:
    """The marked object's mask, at the photograph's size as it is shown. Leaves `image` set in the predictor.

    Raises UserError for marks outside the photograph, or that say nothing of an object.
    """
    image = to_rgb(image)
    known, allowed = _known(image, marks)
    predictor.set_image(image)
    support, mask = known, known == 1
    for _ in range(ROUNDS):
        logits = next(predictor.logits([predictor.register([image], [support])])).mask[0].numpy()
        mask = ((logits > 0) & allowed & (known != 0)) | (known == 1)
        mask = _touching(mask, known == 1)
        support = np.where(known == 0, 0, mask).astype(np.uint8)
    return mask


def _known(image: Image.Image, marks: Marks) -> tuple[UInt8[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """1 on the object, 0 beside it, 255 where marks say neither; and where the object may be."""
    width, height = image.size
    known, allowed = np.full((height, width), paper.VOID, np.uint8), np.ones((height, width), bool)
    y, x = np.mgrid[:height, :width]
    radius = max(1.0, DISC_SHARE * min(width, height))
    if marks.box is not None:
        left, top, right, bottom = marks.box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(f"box {marks.box}: expected left < right and top < bottom within {width}x{height}")
        radius = max(1.0, min(radius, DISC_SHARE * 2 * min(right - left, bottom - top)))
        allowed = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        known[~allowed] = 0
        sides = CORE_SHARE * (right - left) / 2, CORE_SHARE * (bottom - top) / 2
        if not marks.points and marks.scribble is None:
            middle = (left + right - 1) / 2, (top + bottom - 1) / 2
            known[((x - middle[0]) / sides[0]) ** 2 + ((y - middle[1]) / sides[1]) ** 2 <= 1] = 1
            known[int(middle[1]), int(middle[0])] = 1  # of the smallest box too
    if marks.scribble is not None:
        if marks.scribble.shape != (height, width):
            raise UserError(f"scribble: expected (height, width) of {(height, width)}, got {marks.scribble.shape}")
        broad = ndimage.binary_dilation(marks.scribble == 1, iterations=round(radius / 2))
        known[broad & allowed] = 1
        known[marks.scribble == 2] = 0
    near = np.zeros_like(allowed)
    for value, points in ((0, marks.others), (1, marks.points)):
        for point in points:
            if not (0 <= point.x < width and 0 <= point.y < height):
                raise UserError(f"point {point.x:g},{point.y:g}: expected a place within {width}x{height}")
            if value and not allowed[int(point.y), int(point.x)]:
                raise UserError(f"point {point.x:g},{point.y:g}: expected a place within the box {marks.box}")
            squared = (x - point.x) ** 2 + (y - point.y) ** 2
            known[(squared <= radius**2) & allowed] = value
            near |= squared <= (FAR_DISCS * radius) ** 2
    if not (known == 1).any():
        raise UserError("expected a mark on the object: a point, a box or a stroke")
    if not (known == 0).any():
        strip = max(1, round(BORDER_SHARE * min(width, height)))
        border = np.ones((height, width), bool)
        border[strip:-strip, strip:-strip] = False
        border &= (known != 1) & ~near
        known[border] = 0
    if not (known == 0).any():
        raise UserError("expected a mark beside the object, as it may be all of the photograph: add one")
    return known, allowed


def _touching(mask: Bool[np.ndarray, "h w"], seeds: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The mask's connected parts that hold a seed."""
    numbers, _ = ndimage.label(mask)
    return np.isin(numbers, np.unique(numbers[seeds]))
