"""The contract of a data set, and the one place that knows which kinds there are."""

import hashlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from upath import UPath

from fsdino import paper
from fsdino.data.folds import novel_classes
from fsdino.errors import DataError, UserError, reachable
from fsdino.preprocess import orientation, read_image
from fsdino.weights import cache_folder

Split = Literal["train", "val"]


class Dataset(ABC):
    """Images with labels, and folds of classes. Class ids start at 1; a label's 255 is void."""

    name: str
    """Names its stores, runs and scores."""
    root: UPath
    class_names: list[str]
    num_folds: int = 4
    fold_rule: str = "blocks"
    """How classes are split into folds: consecutive blocks."""

    @abstractmethod
    def ids(self, split: Split) -> list[str]:
        """Image ids in the list's order, which is the order of the test queries."""

    @abstractmethod
    def source(self, image_id: str) -> str:
        """Path or URL of the photograph."""

    @abstractmethod
    def label_source(self, image_id: str) -> str:
        """Path or URL of the file that holds the label."""

    @abstractmethod
    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """Class ids at the photograph's own size, 255 is void."""

    def image(self, image_id: str) -> Image.Image:
        """The photograph, RGB."""
        return read_image(self.source(image_id))

    def list_digest(self, split: Split) -> str:
        """Eight hex digits of a split's list: runs on other lists are other runs."""
        return hashlib.sha256("\n".join(self.ids(split)).encode()).hexdigest()[:8]

    def novel(self, fold: int) -> list[int]:
        """Class ids that the fold tests."""
        return novel_classes(fold, len(self.class_names), self.num_folds)

    def class_pixels(self, split: Split) -> dict[str, dict[int, int]]:
        """Pixel counts of every class in every image of a split."""
        return {image_id: label.pixels for image_id, label in self.labels(split).items()}

    def labels(self, split: Split) -> dict[str, "LabelSummary"]:
        """What the labels of a split hold; kept in the cache, keyed by list and label times.

        Raises DataError for a label with classes that the data set does not have.
        """
        ids = self.ids(split)
        with ThreadPoolExecutor(16) as pool:
            stamps = list(pool.map(lambda image_id: _stamp(self.label_source(image_id)), ids))
        described = json.dumps([str(self.root.resolve()), self.class_names, ids, stamps])
        key = hashlib.sha256(described.encode()).hexdigest()[:16]
        cached = cache_folder() / f"labels-{key}.json"
        if cached.exists():
            return {i: LabelSummary.of_record(record) for i, record in json.loads(cached.read_text()).items()}
        with ThreadPoolExecutor() as pool:
            labels = dict(zip(ids, pool.map(self.summary, ids), strict=True))
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{uuid.uuid4().hex}.partial")
        partial.write_text(json.dumps(labels))
        partial.rename(cached)
        return labels

    def labels_digest(self, split: Split, image_ids: Iterable[str]) -> str:
        """Eight hex digits of what the labels of these images hold."""
        labels = self.labels(split)
        described = json.dumps([(image_id, labels[image_id]) for image_id in image_ids])
        return hashlib.sha256(described.encode()).hexdigest()[:8]

    def summary(self, image_id: str) -> "LabelSummary":
        """What a label holds. Raises DataError for classes that the data set does not have."""
        label = self.label(image_id)
        counts = np.bincount(label.ravel(), minlength=256)
        beyond = [c for c in np.flatnonzero(counts) if len(self.class_names) < c < paper.VOID]
        if beyond:
            raise DataError(
                f"{self.label_source(image_id)}: expected classes 0 to {len(self.class_names)} and 255, got "
                f"{', '.join(map(str, beyond[:8]))}; correct the label, or name all classes in classes.txt"
            )
        height, width = label.shape
        return LabelSummary((width, height), {c: int(counts[c]) for c in self.class_ids if counts[c]})

    @property
    def class_ids(self) -> range:
        """Ids of all classes."""
        return range(1, len(self.class_names) + 1)


class LabelSummary(NamedTuple):
    """What is known of a label without its pixels."""

    size: tuple[int, int]
    """(width, height)."""
    pixels: dict[int, int]
    """Of each class that has any."""

    @classmethod
    def of_record(cls, record: Any) -> "LabelSummary":
        """From JSON."""
        (width, height), pixels = record
        return cls((width, height), {int(c): n for c, n in pixels.items()})


def check_label_sizes(dataset: Dataset, split: Split, photographs: Mapping[str, tuple[int, int]]) -> None:
    """Raise DataError if labels are not of their photographs' sizes; `photographs` are (width, height) by image id.

    A label of another size would be stretched onto its photograph, one that is turned crushed.
    """
    labels = dataset.labels(split)
    differing = [i for i, size in photographs.items() if i in labels and tuple(size) != labels[i].size]
    if differing:
        first = differing[0]
        (width, height), label, source = photographs[first], labels[first].size, dataset.source(first)
        if dataset.image(first).size == label:
            raise UserError(
                f"{source}: the photograph has changed since it was encoded at {width}x{height}, to "
                f"{label[0]}x{label[1]}; rerun the extraction with --refresh"
            )
        raise DataError(
            f"{dataset.label_source(first)}: expected the size of its photograph {source}, {width}x{height} (EXIF "
            f"orientation {orientation(source)}), got {label[0]}x{label[1]}; {len(differing)} of {len(photographs)} "
            "labels differ; save labels as photographs are shown"
        )


def open_dataset(place: str) -> Dataset:
    """The data set at a path or fsspec URL, recognised by its layout. Raises UserError if it is of no known kind."""
    from fsdino.data.voc import VocDataset

    return VocDataset(place)


def _stamp(place: str) -> str | None:
    """What changes when a file does; None if it is not there."""
    try:
        with reachable(place):
            stat = os.stat(place) if place.startswith("/") else UPath(place).stat()
    except FileNotFoundError:
        return None
    return f"{stat.st_size} {stat.st_mtime}"
