"""Episodes: one query, K supports and a class, drawn from (seed, fold, index) alone.

No episode depends on the number of workers or on the episodes before it, so a run resumes, shards over workers and
repeats exactly.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fsdino.data.protocols import ImageClasses
from fsdino.errors import DataError

TRAIN, TEST, ORDER = 0, 1, 2


@dataclass(frozen=True)
class Episode:
    """Image ids, and for the query and then each support its view and whether its features are mirrored."""

    class_id: int
    query: str
    supports: tuple[str, ...]
    views: tuple[int, ...]
    flips: tuple[bool, ...]

    def plain(self) -> "Episode":
        """The same images unmirrored, for pictures."""
        return replace(self, flips=(False,) * len(self.flips))


class EpisodeSampler:
    """Episodes over images that are each annotated with their classes (see Protocol.images).

    Test queries come in the images' order. Training queries come in epochs: each a permutation of the images, every
    image once; or, with `balance` above 0, the class is drawn first, by its number of images to the power
    1 - `balance` (1: all equally likely), then one of its images. Training also draws each image's view, and whether
    its features are mirrored (`flip`, one half). Supports are distinct and never the query.

    Raises UserError if a class has too few images for an episode.
    """

    def __init__(
        self,
        images: Mapping[str, ImageClasses],
        *,
        shots: int,
        fold: int,
        seed: int,
        training: bool,
        num_views: int = 1,
        balance: float = 0.0,
        flip: bool = False,
    ):
        self.images = list(images)
        self.by_class: dict[int, list[str]] = {}
        for image_id, classes in images.items():
            for class_id in classes.listed:
                self.by_class.setdefault(class_id, []).append(image_id)
        asked = {c for of_image in images.values() for c in (*of_image.listed, *of_image.drawn)}
        few: dict[int, int] = {c: len(self.by_class.get(c, [])) for c in sorted(asked)}
        few = {c: count for c, count in few.items() if count <= shots}
        if not self.images:
            raise DataError(
                f"fold {fold}: expected images of its {'base' if training else 'novel'} classes, got none at all; "
                "check lists and labels"
            )
        if few:
            raise DataError(
                f"fold {fold}: expected at least {shots + 1} images of every class for {shots}-shot episodes, "
                f"got {few}; use fewer shots or more images"
            )
        self.classes = {image_id: of_image.drawn for image_id, of_image in images.items()}
        self.digest = hashlib.sha256(json.dumps(list(images.items())).encode()).hexdigest()[:8]
        """Of the images and their classes: what the episodes are drawn from."""
        self.shots, self.fold, self.seed, self.training = shots, fold, seed, training
        self.num_views, self.flip = num_views, flip
        sizes = np.array([len(self.by_class[c]) for c in sorted(self.by_class)], float)
        self.class_shares = sizes ** (1 - balance) / (sizes ** (1 - balance)).sum() if balance > 0 else None

    def episode(self, index: int) -> Episode:
        """The episode of that index."""
        rng = np.random.default_rng([self.seed, self.fold, TRAIN if self.training else TEST, index])
        if self.class_shares is not None:
            class_id = sorted(self.by_class)[rng.choice(len(self.class_shares), p=self.class_shares)]
            query = self.by_class[class_id][rng.integers(len(self.by_class[class_id]))]
        else:
            epoch, position = divmod(index, len(self.images))
            if self.training:
                position = _order(self.seed, self.fold, epoch, len(self.images))[position]
            query = self.images[position]
            class_id = self.classes[query][rng.integers(len(self.classes[query]))]
        others = [image_id for image_id in self.by_class[class_id] if image_id != query]
        supports = tuple(others[i] for i in rng.choice(len(others), self.shots, replace=False))
        views = tuple(int(v) for v in rng.integers(self.num_views, size=1 + self.shots))
        flips = tuple(bool(f) for f in rng.random(1 + self.shots) < (0.5 if self.flip else 0))
        return Episode(class_id, query, supports, views, flips)


@functools.lru_cache(maxsize=4)
def _order(seed: int, fold: int, epoch: int, num_images: int) -> list[int]:
    """The order of an epoch's queries."""
    return np.random.default_rng([seed, fold, ORDER, epoch]).permutation(num_images).tolist()
