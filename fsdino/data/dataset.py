"""The contract of a data set, and the one place that knows which kinds there are."""

import functools
import hashlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from upath import UPath

from fsdino import paper
from fsdino.data.folds import Folds
from fsdino.data.masks import binary_label
from fsdino.errors import DataError, UserError, reachable
from fsdino.kinds import Kind
from fsdino.preprocess import Source, orientation, read_image
from fsdino.weights import cache_folder

Split = Literal["train", "val"]
FORMAT = 2
"""Of what is kept of labels in the cache."""
GRID = (slice(1, None, 32), slice(1, None, 32))


class Dataset(ABC):
    """Images, the masks of their classes, and folds of classes. Class ids start at 1; a mask's 255 is void."""

    name: str
    """Names its stores, runs and scores."""
    root: UPath
    class_names: list[str]
    splits: tuple[Split, ...] = ("train", "val")
    """Lists that it has."""
    min_pixels: int | None = None
    """Labelled pixels from which an image is listed for a class, whatever the protocol says."""
    is_coco: bool = False
    """Whether it is COCO, for which protocols have numbers of their own."""
    each_image_once: bool = False
    """Whether a test is each image of the list once."""
    skip_bad: bool = False
    """Whether images whose labels cannot be used are left out, instead of being an error."""
    kinds: tuple[Kind, ...]
    """What `--dataset` calls it."""
    layout: str
    """What its folder holds, in words."""

    def __init__(self, root: Source, kind: Kind) -> None:
        self.root, self.kind = UPath(root), kind
        self.skipped: dict[str, str] = {}
        """Images that were left out, and why."""
        self.lists: dict[Split, list[str]] = {}
        """Lists of one's own, instead of the data set's."""
        self._labels: dict[str, dict[str, LabelSummary]] = {}

    @classmethod
    @abstractmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """Which of its kinds a folder could be, by its layout."""

    @abstractmethod
    def own_ids(self, split: Split) -> list[str]:
        """Image ids of the data set's own list."""

    @abstractmethod
    def source(self, image_id: str) -> str:
        """Path or URL of the photograph."""

    @abstractmethod
    def label_source(self, image_id: str) -> str:
        """Path or URL of the file that holds the masks."""

    def label_sources(self, image_id: str) -> list[str]:
        """All files that hold masks of an image."""
        return [self.label_source(image_id)]

    @abstractmethod
    def mask(self, image_id: str, class_id: int) -> UInt8[np.ndarray, "h w"]:
        """1 on the class, 0 elsewhere, 255 void, at the photograph's own size."""

    @abstractmethod
    def summary(self, image_id: str) -> "LabelSummary":
        """What the masks of an image hold. Raises DataError for classes that the data set does not have."""

    @abstractmethod
    def split_classes(self) -> Folds:
        """The folds. Raises DataError if a class would never be tested."""

    def notes(self) -> list[str]:
        """What is unusual about the data set, in lines."""
        return []

    def ids(self, split: Split) -> list[str]:
        """Image ids in the list's order, which is the order of the test queries."""
        return list(self.lists[split]) if split in self.lists else self.own_ids(split)

    def image(self, image_id: str) -> Image.Image:
        """The photograph, RGB."""
        return read_image(self.source(image_id))

    def list_digest(self, split: Split) -> str:
        """Eight hex digits of a split's list: runs on other lists are other runs."""
        return list_digest(self.ids(split))

    @functools.cached_property
    def folds(self) -> Folds:
        """How classes are split for training and test."""
        return self.split_classes()

    def novel(self, fold: int | None) -> list[int]:
        """Class ids that the fold tests; without a fold, none."""
        return self.folds.novel(fold)

    def class_pixels(self, split: Split) -> dict[str, dict[int, int]]:
        """Pixel counts of every class in every image of a split that can be used."""
        return {image_id: label.pixels for image_id, label in self.labels(split).items()}

    def class_points(self, split: Split) -> dict[str, dict[int, int]]:
        """As `class_pixels`, of the pixels at every 32nd row and column."""
        return {image_id: label.grid for image_id, label in self.labels(split).items()}

    def labels(self, split: Split) -> dict[str, "LabelSummary"]:
        """What the labels of a split hold; kept in the cache, keyed by list and label times.

        Raises DataError for a label that cannot be used, or leaves its image out (`skip_bad`).
        """
        ids = self.ids(split)
        places = list(dict.fromkeys(place for image_id in ids for place in self.label_sources(image_id)))
        with ThreadPoolExecutor(16) as pool:
            stamps = list(pool.map(_stamp, places))
        described = json.dumps([FORMAT, str(self.root.resolve()), self.name, self.class_names, ids, places, stamps])
        key = hashlib.sha256(described.encode()).hexdigest()[:16]
        if key not in self._labels:
            self._labels = {key: self._read_labels(ids, cache_folder() / f"labels-{key}.json")}
        return self._labels[key]

    def _read_labels(self, ids: list[str], cached: Path) -> dict[str, "LabelSummary"]:
        if cached.exists():
            return {i: LabelSummary.of_record(record) for i, record in json.loads(cached.read_text()).items()}
        skipped: dict[str, str] = {}
        with ThreadPoolExecutor() as pool:
            found = pool.map(functools.partial(self._usable, skipped=skipped), ids)
            labels = {i: label for i, label in zip(ids, found, strict=True) if label is not None}
        self.skipped |= skipped
        if not skipped:
            partial = cached.with_suffix(f".{uuid.uuid4().hex}.partial")
            partial.write_text(json.dumps(labels))
            partial.rename(cached)
        return labels

    def labels_digest(self, split: Split, image_ids: Iterable[str]) -> str:
        """Eight hex digits of what the labels of these images hold."""
        labels = self.labels(split)
        described = json.dumps([(image_id, labels[image_id]) for image_id in image_ids])
        return hashlib.sha256(described.encode()).hexdigest()[:8]

    @property
    def class_ids(self) -> range:
        """Ids of all classes."""
        return range(1, len(self.class_names) + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_labels": {}}

    def _usable(self, image_id: str, skipped: dict[str, str]) -> "LabelSummary | None":
        try:
            return self.summary(image_id)
        except UserError as error:
            if not self.skip_bad:
                raise
            skipped[image_id] = error.args[0]
            return None


class LabelledDataset(Dataset):
    """A data set whose images have one map of class numbers each."""

    @abstractmethod
    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """Class ids at the photograph's own size, 255 is void."""

    def mask(self, image_id: str, class_id: int) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        return binary_label(self.label(image_id), class_id)

    def summary(self, image_id: str) -> "LabelSummary":
        """See Dataset."""
        label = self.label(image_id)
        counts = np.bincount(label.ravel(), minlength=256)
        beyond = [c for c in np.flatnonzero(counts) if len(self.class_names) < c < paper.VOID]
        if beyond:
            raise DataError(
                f"{self.label_source(image_id)}: expected classes 0 to {len(self.class_names)} and 255, got "
                f"{', '.join(map(str, beyond[:8]))}; correct the label, or name all classes in classes.txt"
            )
        height, width = label.shape
        seen = (counts, np.bincount(label[GRID].ravel(), minlength=256))
        return LabelSummary((width, height), *({c: int(of[c]) for c in self.class_ids if of[c]} for of in seen))


def list_digest(ids: Iterable[str]) -> str:
    """Eight hex digits of a list of images."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:8]


class LabelSummary(NamedTuple):
    """What is known of a label without its pixels."""

    size: tuple[int, int]
    """(width, height)."""
    pixels: dict[int, int]
    """Of each class that has any."""
    grid: dict[int, int]
    """Of those, the ones at rows and columns 1, 33, 65, ...: the field's first lists count them (protocols.py)."""

    @classmethod
    def of_record(cls, record: Any) -> "LabelSummary":
        """From JSON."""
        (width, height), *counts = record
        return cls((width, height), *({int(c): n for c, n in of.items()} for of in counts))

    @classmethod
    def of_masks(cls, size: tuple[int, int], masks: Mapping[int, np.ndarray]) -> "LabelSummary":
        """From the masks of an image's classes, 1 on the class."""
        pixels = {c: int((mask == 1).sum()) for c, mask in masks.items()}
        grid = {c: int((mask[GRID] == 1).sum()) for c, mask in masks.items()}
        return cls(size, *({c: n for c, n in of.items() if n} for of in (pixels, grid)))


def differing_sizes(dataset: Dataset, split: Split, photographs: Mapping[str, tuple[int, int]]) -> set[str]:
    """Images whose labels are not of their photographs' sizes; `photographs` are (width, height) by image id.

    A label of another size would be stretched onto its photograph, one that is turned crushed. Raises DataError if
    there are any, unless bad images are to be skipped.
    """
    labels = dataset.labels(split)
    differing = [i for i, size in photographs.items() if i in labels and tuple(size) != labels[i].size]
    if differing and not dataset.skip_bad:
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
    for image_id in differing:
        dataset.skipped[image_id] = (
            f"{dataset.label_source(image_id)}: its label is {labels[image_id].size}, its photograph "
            f"{photographs[image_id]}"
        )
    return set(differing)


def open_dataset(place: str, kind: Kind | None = None) -> Dataset:
    """The data set at a path or fsspec URL, recognised by its layout unless its kind is named.

    Raises UserError if it is of no known kind, or could be two.
    """
    from fsdino.data.coco import CocoDataset
    from fsdino.data.davis import DavisDataset
    from fsdino.data.folder import FolderOfClasses, InstancesFolder, NumberedFolder
    from fsdino.data.fss1000 import Fss1000Dataset
    from fsdino.data.voc import VocDataset

    known: tuple[type[Dataset], ...] = (
        VocDataset,
        DavisDataset,
        CocoDataset,
        NumberedFolder,
        FolderOfClasses,
        InstancesFolder,
        Fss1000Dataset,
    )
    with reachable(place):
        root = UPath(place)
        found = {k: of for of in known for k in of.kinds_at(root)} if root.is_dir() else {}
    if kind is not None and kind not in found:
        looked_for = next(of for of in known if kind in of.kinds).layout
        raise UserError(f"{place}: expected a data set of --dataset {kind}, which has {looked_for}; found none")
    if not found:
        layouts = "; ".join(dict.fromkeys(f"{' or '.join(of.kinds)}: {of.layout}" for of in known))
        raise UserError(f"{place}: expected a data set, found none of these layouts: {layouts}")
    if kind is None and len(found) > 1:
        raise UserError(f"{place}: expected one data set, found {' and '.join(found)}; choose one with --dataset")
    chosen = next(k for k in found if kind in (None, k))
    return found[chosen](root, chosen)


def _stamp(place: str) -> str | None:
    """What changes when a file does; None if it is not there."""
    try:
        with reachable(place):
            stat = os.stat(place) if place.startswith("/") else UPath(place).stat()
    except FileNotFoundError:
        return None
    return f"{stat.st_size} {stat.st_mtime}"
