"""Data of one's own: a folder with images and masks, or with images and a JSON of COCO's format.

- images/ID.jpg (or any other kind of photograph; folders below it are part of the id), and
- masks/ID.png of class numbers (0 background, 255 void) with classes.txt, the classes' names, one a line; or
- masks/CLASS/ID.png, a mask for each class, of which an image has those of the classes that it shows; or
- one JSON of COCO's format in the root or in annotations/ (instances.py has the rules).

train.txt and val.txt list ids (lists.py has their forms); without them a quarter of the images, drawn by their names,
is val. folds.txt splits the classes, one fold a line, with commas between names; without it four blocks do.
"""

import os
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino.data.dataset import Dataset, LabelledDataset, LabelSummary, Split
from fsdino.data.folds import Folds, blocks, parse_folds
from fsdino.data.instances import Instances, read_instances
from fsdino.data.lists import parse_classes, parse_ids
from fsdino.data.masks import read_binary, read_label
from fsdino.errors import DataError, reachable
from fsdino.kinds import Kind
from fsdino.preprocess import SUFFIXES, Source

TEST_EVERY = 4  # of the images, on average
FOLDERS = ("images", "masks")


class Folder(Dataset):
    """Images, lists and folds; how masks are kept is a subclass's matter."""

    kinds = ("folder",)
    layout = "images, and masks or a JSON of COCO's format"

    def __init__(self, root: Source, kind: Kind = "folder"):
        super().__init__(root, kind)
        self.name = self.root.resolve().name
        with reachable(self.root):
            names = sorted(name for name in _below(self.root / "images") if _suffix(name) in SUFFIXES)
            self._images = {name.rsplit(".", 1)[0]: name for name in names}
            listed = self.root / "classes.txt"
            self._listed = parse_classes(str(listed), listed.read_bytes()) if listed.exists() else None
            self.class_names = self.names()
        if len(self._images) < len(names):
            twice = next(name for name in names if self._images[name.rsplit(".", 1)[0]] != name)
            raise DataError(f"{self.root}/images: expected one photograph for each name, got {twice} and another")

    @abstractmethod
    def names(self) -> list[str]:
        """The classes."""

    def split_classes(self) -> Folds:
        """See Dataset."""
        path = self.root / "folds.txt"
        with reachable(path):
            if path.exists():
                return parse_folds(str(path), path.read_bytes(), self.class_names)
        return blocks(len(self.class_names))

    def own_ids(self, split: Split) -> list[str]:
        """See Dataset."""
        lists = {name: self.root / f"{name}.txt" for name in ("train", "val")}
        with reachable(self.root):
            if lists[split].exists():
                return parse_ids(str(lists[split]), lists[split].read_bytes(), FOLDERS, "masks")
            if any(path.exists() for path in lists.values()):
                raise DataError(f"{self.root}: expected train.txt and val.txt, or neither, found one")
        tests = {i: zlib.crc32(i.encode(errors="surrogateescape")) % TEST_EVERY == 0 for i in self.all_ids()}
        return [i for i, test in tests.items() if test == (split == "val")]

    def all_ids(self) -> list[str]:
        """Images of both splits."""
        return list(self._images)

    def notes(self) -> list[str]:
        """See Dataset. Masks of photographs that are not there."""
        orphans = sorted(self.masked_ids() - self._images.keys())
        many = f"{self.root}/masks: {len(orphans)} masks are of no photograph in images (the first: {orphans[:1]})"
        return [many] if orphans else []

    def masked_ids(self) -> set[str]:
        """Images that masks are for."""
        return {name.rsplit(".", 1)[0] for name in _below(self.root / "masks")}

    def source(self, image_id: str) -> str:
        """See Dataset. A photograph that is not there is a JPEG."""
        return str(self.root / "images" / self._images.get(image_id, f"{image_id}.jpg"))


class NumberedFolder(Folder, LabelledDataset):
    """masks/ID.png of class numbers, and classes.txt."""

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        return ["folder"] if (root / "images").is_dir() and _form(root) == "numbers" else []

    def names(self) -> list[str]:
        """See Folder."""
        if self._listed is None:
            raise DataError(
                f"{self.root}: expected classes.txt with the classes' names, one a line from class 1, as masks hold "
                "class numbers; write it (or put the masks of each class into masks/CLASS)"
            )
        return self._listed

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "masks" / f"{image_id}.png")

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        return read_label(self.label_source(image_id))


class FolderOfClasses(Folder):
    """masks/CLASS/ID.png, a mask for each class; classes may overlap."""

    def __init__(self, root: Source, kind: Kind = "folder"):
        super().__init__(root, kind)
        with reachable(self.root):
            self._masks = {
                name: {path.rsplit(".", 1)[0] for path in _below(self.root / "masks" / name)}
                for name in self.class_names
            }

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        return ["folder"] if (root / "images").is_dir() and _form(root) == "classes" else []

    def masked_ids(self) -> set[str]:
        """See Folder."""
        return set().union(*self._masks.values())

    def names(self) -> list[str]:
        """See Folder. Sorted, or in the order of classes.txt."""
        found = sorted(path.name for path in _visible(self.root / "masks") if path.is_dir())
        if self._listed is not None and sorted(self._listed) != found:
            raise DataError(
                f"{self.root}: expected a folder in masks for each class of classes.txt, found {', '.join(found[:8])}"
            )
        return self._listed or found

    def label_source(self, image_id: str) -> str:
        """See Dataset. Of several masks the first class's."""
        of = next((name for name in self.class_names if image_id in self._masks[name]), self.class_names[0])
        return str(self.root / "masks" / of / f"{image_id}.png")

    def label_sources(self, image_id: str) -> list[str]:
        """See Dataset."""
        of = [name for name in self.class_names if image_id in self._masks[name]]
        return [str(self.root / "masks" / name / f"{image_id}.png") for name in of]

    def mask(self, image_id: str, class_id: int) -> UInt8[np.ndarray, "h w"]:
        """See Dataset. An image that a class has no mask for does not show it."""
        name = self.class_names[class_id - 1]
        if image_id in self._masks[name]:
            return read_binary(str(self.root / "masks" / name / f"{image_id}.png"))
        return np.zeros(self.image(image_id).size[::-1], np.uint8)

    def summary(self, image_id: str) -> LabelSummary:
        """See Dataset. Raises DataError for masks of several sizes."""
        masks = {c: self.mask(image_id, c) for c in self.class_ids if image_id in self._masks[self.class_names[c - 1]]}
        shapes = {mask.shape for mask in masks.values()} or {self.image(image_id).size[::-1]}
        if len(shapes) > 1:
            raise DataError(f"{self.label_source(image_id)}: expected masks of one size for its image, got {shapes}")
        height, width = shapes.pop()
        return LabelSummary.of_masks((width, height), masks)


class InstancesFolder(Folder, LabelledDataset):
    """One JSON of COCO's format, in the root or in annotations/."""

    def __init__(self, root: Source, kind: Kind = "folder"):
        self._instances: Instances | None = None
        self._jsons = _jsons(UPath(root))
        super().__init__(root, kind)
        self._numbers = {name.rsplit(".", 1)[0]: i for i, name in enumerate(self.instances.names)}

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        return ["folder"] if (root / "images").is_dir() and _form(root) == "json" else []

    @property
    def instances(self) -> Instances:
        """The annotations."""
        if self._instances is None:
            self._instances = read_instances(self._jsons[0])
        return self._instances

    def names(self) -> list[str]:
        """See Folder."""
        if len(self._jsons) > 1:
            raise DataError(f"{self.root}: expected one JSON of annotations, found several; keep one, and list splits")
        return self.instances.class_names

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self._jsons[0])

    def all_ids(self) -> list[str]:
        """See Folder. Those of the JSON, whose photographs must be there."""
        return list(self._numbers)

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        if image_id not in self._numbers:
            raise DataError(f"{self.label_source(image_id)}: expected image {image_id!r} in it, found none")
        return self.instances.label(self._numbers[image_id])

    def notes(self) -> list[str]:
        """See Dataset."""
        return self.instances.notes(self.label_source(""))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_instances": None}


def _form(root: UPath) -> str | None:
    """How masks are kept; a JSON counts where there is no folder of masks. With classes.txt folders in masks are
    classes if they are called so, else parts of ids."""
    masks, listed = root / "masks", root / "classes.txt"
    if not masks.is_dir():
        return "json" if _jsons(root) else None
    inside = _visible(masks)
    folders = {path.name for path in inside if path.is_dir()}
    if listed.exists():
        return "classes" if folders & set(parse_classes(str(listed), listed.read_bytes())) else "numbers"
    return "classes" if folders and len(folders) == len(inside) else "numbers"


def _visible(folder: UPath) -> list[UPath]:
    """What is in a folder, but for what programs leave there (.DS_Store, .ipynb_checkpoints, __MACOSX)."""
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]


def _jsons(root: UPath) -> list[UPath]:
    folders = [folder for folder in (root, root / "annotations") if folder.is_dir()]
    return sorted((p for folder in folders for p in folder.iterdir() if p.suffix == ".json"), key=str)


def _below(folder: UPath) -> list[str]:
    """Paths of all files below a folder, as they follow it."""
    if not folder.is_dir():
        return []
    base = str(folder).rstrip("/") + "/"
    if not isinstance(folder, Path):
        return [str(path).removeprefix(base) for path in folder.rglob("*") if path.is_file()]
    # Links are followed, but not into a folder that they are in; one that leads nowhere is a file: reading it says so.
    found = []
    for at, inner, names in os.walk(folder, followlinks=True):
        around = {os.path.realpath(parent) for parent in (at, *Path(at).parents)}
        inner[:] = [name for name in inner if os.path.realpath(os.path.join(at, name)) not in around]
        found += [os.path.join(at, name).removeprefix(base) for name in names]
    return found


def _suffix(name: str) -> str:
    return "." + name.rsplit(".", 1)[-1].lower()
