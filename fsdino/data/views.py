"""Views: augmentations that are drawn once per (seed, image, number), so that features of them can be cached.

View 0 is the photograph. A further view is HDMNet's draw: rotate by up to 10 degrees, blur 5x5, flip, each with
probability one half. Its random scale is left out, since the resize to a square undoes it. The view PADDED keeps the
aspect, for the tests of PFENet and BAM: black pixels below or to the right make the photograph square.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from fsdino import paper

MAX_ANGLE_DEG = 10.0
PLAIN, PADDED = 0, 10**6  # numbers of views that are not drawn
BLUR_RADIUS_PX = 1.1  # Gaussian sigma that OpenCV derives for a 5x5 kernel


@dataclass(frozen=True)
class View:
    """One drawn transform, applied alike to the image and to its label."""

    angle_deg: float = 0.0
    blur: bool = False
    flip: bool = False
    pad: bool = False

    def image(self, image: Image.Image) -> Image.Image:
        """The transformed photograph; corners that a rotation uncovers get its mean colour."""
        if self.pad:
            return _padded(image, 0)
        if self.angle_deg:
            mean = tuple(int(c) for c in np.asarray(image).reshape(-1, 3).mean(0))
            image = image.rotate(self.angle_deg, Image.Resampling.BILINEAR, fillcolor=mean)
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS_PX))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def label(self, label: UInt8[np.ndarray, "h w"], res_px: int) -> UInt8[np.ndarray, "r r"]:
        """The label under the same transform, at the square side of training; uncovered corners are void."""
        image = Image.fromarray(label)
        if self.pad:
            image = _padded(image, paper.VOID)
        if self.angle_deg:
            image = image.rotate(self.angle_deg, Image.Resampling.NEAREST, fillcolor=paper.VOID)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image.resize((res_px, res_px), Image.Resampling.NEAREST))

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that the network's square shows of a photograph of that size, which is its upper left
        part."""
        return (max(size), max(size)) if self.pad else size


def draw_view(seed: int, image_id: str, number: int) -> View:
    """The transform of that number; it depends on nothing else."""
    if number == PLAIN:
        return View()
    if number == PADDED:
        return View(pad=True)
    rng = np.random.default_rng([seed, zlib.crc32(image_id.encode()), number])
    rotate, blur, flip = rng.random(3) < 0.5
    angle = float(rng.uniform(-MAX_ANGLE_DEG, MAX_ANGLE_DEG))
    return View(angle_deg=angle if rotate else 0.0, blur=bool(blur), flip=bool(flip))


def _padded(image: Image.Image, fill: int) -> Image.Image:
    """Square, the image in its upper left corner."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), (fill,) * len(image.getbands()) if image.mode == "RGB" else fill)
    square.paste(image, (0, 0))
    return square
