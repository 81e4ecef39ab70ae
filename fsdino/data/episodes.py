"""Episodes: one query, K supports and a class, drawn from (seed, fold, index) alone.

No episode depends on the number of workers or on the episodes before it, so a run resumes, shards over workers and
repeats exactly.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fsdino.data.folds import in_words
from fsdino.data.protocols import ImageClasses, Order
from fsdino.errors import DataError

TRAIN, TEST, ORDER, ABSENT, WAYS = 0, 1, 2, 3, 4
NO_FOLD = 10_000  # stands for the fold in the seed of episodes of all classes


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
    """Episodes over images that are each annotated with their classes (see protocols.py).

    By `order`, items are the images, each of whose classes is drawn anew, or `pairs` of an image and a class (the
    images' own, if none are given). Test queries are the items in turn; training queries come in epochs, each a
    permutation of the items, every item once. With the order `classes`, or `balance` above 0 in training, the class is
    drawn first, by its number of images to the power 1 - `balance` (1: all equally likely), then one of its images.
    Training also draws each image's view, and whether its features are mirrored (`flip`, one half). Supports are never
    the query, and distinct unless `repeats_supports`.

    Raises UserError if a class has too few images for an episode.
    """

    def __init__(
        self,
        images: Mapping[str, ImageClasses],
        *,
        shots: int,
        fold: int | None,
        seed: int,
        training: bool,
        num_views: int = 1,
        balance: float = 0.0,
        flip: bool = False,
        order: Order = "images",
        pairs: Sequence[tuple[str, int]] | None = None,
        repeats_supports: bool = False,
        test_view: int = 0,
    ):
        self.images = list(images)
        self.by_class: dict[int, list[str]] = {}
        for image_id, classes in images.items():
            for class_id in classes.listed:
                self.by_class.setdefault(class_id, []).append(image_id)
        asked = {c for of_image in images.values() for c in (*of_image.listed, *of_image.drawn)}
        few: dict[int, int] = {c: len(self.by_class.get(c, [])) for c in sorted(asked)}
        least = 2 if repeats_supports else shots + 1
        few = {c: count for c, count in few.items() if count < least}
        if not self.images:
            raise DataError(
                f"{in_words(fold)}: expected images of its {'base' if training else 'novel'} classes, got none at all; "
                "check lists, labels, and whether objects are as large as the protocol asks"
            )
        if few:
            raise DataError(
                f"{in_words(fold)}: expected at least {least} images of every class for {shots}-shot episodes, "
                f"got {few}; use fewer shots or more images"
            )
        self.classes = {image_id: of_image.drawn for image_id, of_image in images.items()}
        self.pairs: list[tuple[str, int]] = []
        if order == "pairs":
            listed = [(image_id, class_id) for image_id, of_image in images.items() for class_id in of_image.listed]
            self.pairs = listed if pairs is None else [pair for pair in pairs if pair[0] in images]
        drawn_from = [list(images.items()), *([self.pairs, order] if order != "images" else [])]
        self.digest = hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()[:8]
        """Of the images and their classes: what the episodes are drawn from."""
        self.shots, self.fold, self.seed, self.training = shots, fold, seed, training
        self._fold_seed = NO_FOLD if fold is None else fold
        self.num_views, self.flip, self.test_view, self.repeats_supports = num_views, flip, test_view, repeats_supports
        self.absent_share = 0.0
        self._lacking: Mapping[str, Sequence[int]] = {}
        sizes = np.array([len(self.by_class[c]) for c in sorted(self.by_class)], float)
        power = 0.0 if order == "classes" else 1 - balance
        self.class_shares = sizes**power / (sizes**power).sum() if balance > 0 or order == "classes" else None

    def __len__(self) -> int:
        """Items of an epoch."""
        return len(self.pairs) or len(self.images)

    def episode(self, index: int, seed: int | None = None) -> Episode:
        """The episode of that index, of another seed if one is given."""
        seed = self.seed if seed is None else seed
        rng = np.random.default_rng([seed, self._fold_seed, TRAIN if self.training else TEST, index])
        query, class_id = self._query(rng, index)
        others = [image_id for image_id in self.by_class[class_id] if image_id != query]
        supports = tuple(others[i] for i in rng.choice(len(others), self.shots, replace=self.repeats_supports))
        views = tuple(int(v) for v in rng.integers(self.num_views, size=1 + self.shots))
        if not self.training:
            views = (self.test_view,) * (1 + self.shots)
        flips = tuple(bool(f) for f in rng.random(1 + self.shots) < (0.5 if self.flip else 0))
        if self.absent_share and query in self._lacking and rng.random() < self.absent_share:
            class_id, supports = self._absent(rng, query, self._lacking)
        return Episode(class_id, query, supports, views, flips)

    def with_absent(self, share: float, lacking: Mapping[str, Sequence[int]]) -> "EpisodeSampler":
        """The same episodes, but that for a share of them the class is one that the query lacks (see `lacking`)."""
        mixed = copy.copy(self)
        mixed.absent_share, mixed._lacking = share, lacking
        return mixed

    def lacking(self, pixels: Mapping[str, Mapping[int, int]]) -> dict[str, list[int]]:
        """Images that show no pixel of some class, and those classes; `pixels` are those of every class in every image.

        Raises DataError if every image shows every class.
        """
        classes = {i: [c for c in sorted(self.by_class) if not pixels[i].get(c)] for i in self.images}
        found = {image_id: lacked for image_id, lacked in classes.items() if lacked}
        if not found:
            raise DataError(f"{in_words(self.fold)}: expected images that lack one of its classes, got none")
        return found

    def absent(self, index: int, lacking: Mapping[str, Sequence[int]], seed: int | None = None) -> Episode:
        """An episode whose query lacks the class: the images of `lacking` in turn, each with one of its classes."""
        rng = np.random.default_rng([self.seed if seed is None else seed, self._fold_seed, ABSENT, index])
        query = list(lacking)[index % len(lacking)]
        class_id, supports = self._absent(rng, query, lacking)
        return Episode(class_id, query, supports, (self.test_view,) * (1 + self.shots), (False,) * (1 + self.shots))

    def _absent(
        self, rng: np.random.Generator, query: str, lacking: Mapping[str, Sequence[int]]
    ) -> tuple[int, tuple[str, ...]]:
        """A class that an image lacks, and supports of it."""
        class_id = lacking[query][int(rng.integers(len(lacking[query])))]
        members = self.by_class[class_id]
        return class_id, tuple(members[i] for i in rng.choice(len(members), self.shots, replace=self.repeats_supports))

    def ways(self, index: int, ways: int, seed: int | None = None) -> list[Episode]:
        """The episode of that index, and the same query for further classes of the fold, each with its own supports:
        classes to be told apart in one image, which need not show the others."""
        seed = self.seed if seed is None else seed
        episodes = [self.episode(index, seed)]
        query, first = episodes[0].query, episodes[0].class_id
        rng = np.random.default_rng([seed, self._fold_seed, WAYS, index])
        others = [class_id for class_id in sorted(self.by_class) if class_id != first]
        for class_id in rng.choice(others, ways - 1, replace=False).tolist():
            members = [image_id for image_id in self.by_class[class_id] if image_id != query]
            supports = tuple(members[i] for i in rng.choice(len(members), self.shots, replace=self.repeats_supports))
            episodes.append(replace(episodes[0], class_id=class_id, supports=supports))
        return episodes

    def _query(self, rng: np.random.Generator, index: int) -> tuple[str, int]:
        """The query of an index, and its class."""
        if self.class_shares is not None:
            class_id = sorted(self.by_class)[rng.choice(len(self.class_shares), p=self.class_shares)]
            return self.by_class[class_id][rng.integers(len(self.by_class[class_id]))], class_id
        epoch, position = divmod(index, len(self))
        if self.training:
            position = _order(self.seed, self._fold_seed, epoch, len(self))[position]
        if self.pairs:
            return self.pairs[position]
        query = self.images[position]
        return query, self.classes[query][rng.integers(len(self.classes[query]))]


@functools.lru_cache(maxsize=4)
def _order(seed: int, fold: int, epoch: int, num_images: int) -> list[int]:
    """The order of an epoch's queries."""
    return np.random.default_rng([seed, fold, ORDER, epoch]).permutation(num_images).tolist()
