"""The field's protocols as values of one type: which images train and test, and for which classes.

Numbers under different protocols differ by points, so every result names its own and its switches.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fsdino import paper
from fsdino.data.dataset import Dataset, Split
from fsdino.data.views import PLAIN
from fsdino.errors import UserError

Order = Literal["images", "pairs", "classes"]
ScoredAt = Literal["label", "square"]


class ImageClasses(NamedTuple):
    """The classes of an image under a protocol."""

    listed: tuple[int, ...]
    """For which the image may be a support."""
    drawn: tuple[int, ...]
    """Among which an episode's class is drawn when the image is its query."""


@dataclass(frozen=True)
class Protocol:
    """How a data set becomes episodes, and how they are scored. Void is background in a support's mask; the query
    itself is never a support."""

    name: str
    min_pixels: int
    """Labelled pixels from which an image is listed for a class; with `listed_on_grid` those at every 32nd row and
    column alone count."""
    drops_novel: bool
    """Whether a base image with a single novel pixel is dropped from training; else novel pixels are background."""
    draws_any_pixel: bool
    """Whether a query's class is drawn among all classes of the fold with a pixel in it, or among the listed ones."""
    listed_on_grid: bool = False
    order: Order = "images"
    """Queries are the images in the list's order, the (image, class) pairs in theirs, or an image of a class that is
    drawn first, all classes equally likely."""
    repeats_supports: bool = False
    """Whether an image may be two of an episode's supports."""
    void_in_training: Literal["ignored", "background"] = "ignored"
    """What a query's void is for the loss."""
    scores_void: bool = False
    """Whether void is scored as background."""
    scored_at: ScoredAt = "label"
    """The label's own size, or the network's square."""
    align_corners: bool = False
    """How logits are enlarged: with corners aligned, as most published code does, or with half-pixel centres."""
    test_view: int = PLAIN
    """The view under which test images are seen (views.py); padded ones keep the aspect."""
    episodes: int = 1000
    """Test episodes of a seed."""
    seeds: int = 1
    """Over which published results are averaged."""

    def of(self, dataset: Dataset) -> "Protocol":
        """The protocol with what it says about a data set of this kind."""
        if dataset.each_image_once:
            return replace(self, order="images", episodes=len(dataset.ids("val")))
        changes: dict[str, Any] = ON_COCO.get(self.name, {}) if dataset.is_coco else {}
        return replace(self, **changes)

    def of_training(self) -> dict[str, Any]:
        """The rules that a training depends on; all others are the test's, and make no other model."""
        names = (
            "name",
            "min_pixels",
            "listed_on_grid",
            "drops_novel",
            "draws_any_pixel",
            "order",
            "repeats_supports",
            "void_in_training",
        )
        return {name: getattr(self, name) for name in names}

    def training_images(
        self, dataset: Dataset, fold: int | None, held_out: Collection[int] = ()
    ) -> dict[str, ImageClasses]:
        """Images that may train the fold, with their base classes, in the list's order. Base classes that are held out
        for validation count as novel ones."""
        unseen = {*dataset.novel(fold), *held_out}
        return self._without(dataset, unseen, set(dataset.folds.base(fold)) - unseen)

    def validation_images(
        self, dataset: Dataset, fold: int | None, held_out: Collection[int]
    ) -> dict[str, ImageClasses]:
        """Training images that show base classes that are held out; novel ones are treated as in training."""
        return self._without(dataset, set(dataset.novel(fold)), set(held_out))

    def _without(self, dataset: Dataset, unseen: set[int], classes: set[int]) -> dict[str, ImageClasses]:
        """Training images of classes; those with a pixel of unseen ones are dropped, if the protocol does."""
        pixels = dataset.class_pixels("train")
        dropped = {i for i, counts in pixels.items() if self.drops_novel and unseen & counts.keys()}
        return self._images(dataset, "train", classes, dropped)

    def test_images(self, dataset: Dataset, fold: int | None) -> dict[str, ImageClasses]:
        """Images that test the fold, with their novel classes, in the list's order."""
        return self._images(dataset, "val", set(dataset.novel(fold)))

    def _images(
        self, dataset: Dataset, split: Split, classes: set[int], dropped: Collection[str] = ()
    ) -> dict[str, ImageClasses]:
        """Images that are listed for any of the classes, without those that are dropped. A class without a listed image
        has no supports: it is left out."""
        pixels = {i: counts for i, counts in dataset.class_pixels(split).items() if i not in dropped}
        counted, least = pixels, self.min_pixels
        if dataset.min_pixels is not None:
            least = dataset.min_pixels
        elif self.listed_on_grid:
            counted = dataset.class_points(split)
        listed = {
            image_id: tuple(sorted(c for c, n in counted[image_id].items() if c in classes and n >= least))
            for image_id in pixels
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


HDMNET = Protocol("hdmnet", min_pixels=paper.MIN_CLASS_PIXELS, drops_novel=True, draws_any_pixel=True, seeds=10)
# HSNet's lists are OSLSM's, which keep a class with more than two pixels in a mask scaled by 1/32. This rule gives
# their test pairs but for 8 of 1,868, which hang on round-off in a library of the time; --pairs takes the lists.
HSNET = Protocol(
    "hsnet",
    min_pixels=3,
    listed_on_grid=True,
    drops_novel=False,
    draws_any_pixel=False,
    order="pairs",
    repeats_supports=True,
    void_in_training="background",
    scored_at="square",
    align_corners=True,
)
PROTOCOLS = {protocol.name: protocol for protocol in (HDMNET, HSNET)}
PIXELS = {"min_pixels": paper.MIN_CLASS_PIXELS, "listed_on_grid": False}
ON_COCO: dict[str, dict[str, Any]] = {"hdmnet": {"episodes": 10_000}, "hsnet": {"order": "classes"} | PIXELS}


def protocol_of(name: str) -> Protocol:
    """The protocol called `name`. Raises UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
