"""The field's protocols as values of one type: which images train and test, and for which classes.

Numbers under different protocols differ by points, so every result names its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fsdino import paper
from fsdino.data.dataset import Dataset
from fsdino.errors import UserError


class ImageClasses(NamedTuple):
    """The classes of an image under a protocol."""

    listed: tuple[int, ...]
    """For which the image may be a support."""
    drawn: tuple[int, ...]
    """Among which an episode's class is drawn when the image is its query."""


@dataclass(frozen=True)
class Protocol:
    """How a data set becomes episodes. Supports are distinct and never the query; void is ignored in loss and scores,
    and background in a support's mask; scores are computed at the label's size."""

    name: str
    min_pixels: int
    """Labelled pixels from which an image is listed for a class."""
    drops_novel: bool
    """Whether a base image with a single novel pixel is dropped from training; else novel pixels are background."""
    draws_any_pixel: bool
    """Whether a query's class is drawn among all classes of the fold with a pixel in it, or among the listed ones."""

    def training_images(self, dataset: Dataset, fold: int) -> dict[str, ImageClasses]:
        """Images that may train the fold, with their base classes, in the list's order."""
        novel = set(dataset.novel(fold))
        base = {c for c in range(1, len(dataset.class_names) + 1)} - novel
        pixels = dataset.class_pixels("train")
        kept = {i: counts for i, counts in pixels.items() if not self.drops_novel or not novel & counts.keys()}
        return self.images(kept, base)

    def test_images(self, dataset: Dataset, fold: int) -> dict[str, ImageClasses]:
        """Images that test the fold, with their novel classes, in the list's order."""
        return self.images(dataset.class_pixels("val"), set(dataset.novel(fold)))

    def images(self, pixels: Mapping[str, Mapping[int, int]], classes: set[int]) -> dict[str, ImageClasses]:
        """Images that are listed for any of the classes. A class without a listed image has no supports: it is left
        out."""
        listed = {
            image_id: tuple(sorted(c for c, n in counts.items() if c in classes and n >= self.min_pixels))
            for image_id, counts in pixels.items()
        }
        supported = {c for members in listed.values() for c in members}
        return {
            image_id: ImageClasses(
                members,
                tuple(sorted(supported & pixels[image_id].keys())) if self.draws_any_pixel else members,
            )
            for image_id, members in listed.items()
            if members
        }


HDMNET = Protocol("hdmnet", min_pixels=paper.MIN_CLASS_PIXELS, drops_novel=True, draws_any_pixel=True)
PROTOCOLS = {protocol.name: protocol for protocol in (HDMNET,)}


def protocol_of(name: str) -> Protocol:
    """The protocol called `name`. Raises UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
