"""Data sets in VOC's layout, scored as PASCAL-5i by the `pfenet` protocol.

A root (a path or any fsspec URL) holds JPEGImages/*.jpg, SegmentationClassAug/*.png (palette index = class, 255 =
void), and lists of ids in ImageSets/Segmentation/{train_aug,val}.txt. An optional classes.txt names the classes, one
per line from class 1; without it the twenty of PASCAL VOC are meant. A data set of one's own is known by its folder's
name.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from upath import UPath

from fsdino import paper
from fsdino.data.folds import base_images, novel_classes, novel_images
from fsdino.errors import UserError
from fsdino.preprocess import Source, read_image, read_label
from fsdino.weights import cache_folder

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
Split = Literal["train", "val"]
_LIST = {"train": "train_aug", "val": "val"}


class VocDataset:
    """Images, labels and folds of one root."""

    protocol = "pfenet"

    def __init__(self, root: Source):
        self.root = UPath(root)
        lists = self.root / "ImageSets" / "Segmentation"
        if not lists.is_dir():
            raise UserError(
                f"{self.root}: expected a data set in VOC's layout, found no ImageSets/Segmentation; "
                "name the folder that holds JPEGImages"
            )
        names = self.root / "classes.txt"
        self.class_names = names.read_text().strip().splitlines() if names.exists() else VOC_CLASSES
        self.name = self.root.resolve().name if names.exists() else "pascal-5i"

    def ids(self, split: Split) -> list[str]:
        """Image ids in the list's order, which is the order of the test queries."""
        path = self.root / "ImageSets" / "Segmentation" / f"{_LIST[split]}.txt"
        if not path.exists():
            raise UserError(f"{path}: expected the list of {split} images, found none; VOC's layout needs it")
        return path.read_text().split()

    def image_path(self, image_id: str) -> UPath:
        """Where the photograph is."""
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def image(self, image_id: str) -> Image.Image:
        """The photograph, RGB."""
        return read_image(self.image_path(image_id))

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """Class ids at the photograph's own size, 255 is void."""
        return read_label(self.root / "SegmentationClassAug" / f"{image_id}.png")

    def class_pixels(self, split: Split) -> dict[str, dict[int, int]]:
        """Pixel counts of every class in every image of a split; kept in the cache, keyed by list and label times."""
        ids = self.ids(split)
        folder = self.root / "SegmentationClassAug"
        with ThreadPoolExecutor(16) as pool:
            stamps = list(pool.map(lambda image_id: _stamp(folder / f"{image_id}.png"), ids))
        described = json.dumps([str(self.root.resolve()), self.class_names, ids, stamps])
        key = hashlib.sha256(described.encode()).hexdigest()[:16]
        cached = cache_folder() / f"class-pixels-{key}.json"
        if cached.exists():
            return {i: {int(c): n for c, n in counts.items()} for i, counts in json.loads(cached.read_text()).items()}
        with ThreadPoolExecutor() as pool:
            pixels = dict(zip(ids, pool.map(self._count, ids), strict=True))
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{hash(self)}.partial")
        partial.write_text(json.dumps(pixels))
        partial.rename(cached)
        return pixels

    def _count(self, image_id: str) -> dict[int, int]:
        label = self.label(image_id)
        counts = np.bincount(label.ravel(), minlength=256)
        beyond = [c for c in np.flatnonzero(counts) if len(self.class_names) < c < paper.VOID]
        if beyond:
            raise UserError(
                f"{self.root}/SegmentationClassAug/{image_id}.png: expected classes 0 to {len(self.class_names)} "
                f"and 255, got {beyond[0]}; name further classes in classes.txt"
            )
        return {c: int(counts[c]) for c in range(1, len(self.class_names) + 1) if counts[c]}

    def novel(self, fold: int) -> list[int]:
        """Class ids that the fold tests."""
        return novel_classes(fold, len(self.class_names))

    def training_images(self, fold: int, keep_novel: bool = False) -> dict[str, list[int]]:
        """Images that may train the fold, with their base classes."""
        return base_images(self.class_pixels("train"), self.novel(fold), paper.MIN_CLASS_PIXELS, keep_novel)

    def test_images(self, fold: int) -> dict[str, list[int]]:
        """Images that test the fold, with their novel classes."""
        return novel_images(self.class_pixels("val"), self.novel(fold), paper.MIN_CLASS_PIXELS)


def _stamp(path: UPath) -> str | None:
    """What changes when a file does; None if it is not there."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return f"{stat.st_size} {stat.st_mtime}"


def binary_label(label: UInt8[np.ndarray, "h w"], class_id: int) -> UInt8[np.ndarray, "h w"]:
    """1 on the class, 0 elsewhere, 255 where the label is void."""
    return np.where(label == paper.VOID, paper.VOID, label == class_id).astype(np.uint8)
