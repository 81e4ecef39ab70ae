"""Data sets in VOC's layout.

A root (a path or any fsspec URL) holds JPEGImages (JPEG, or any other kind of photograph), SegmentationClassAug/*.png
(palette index = class, 255 = void), and lists of images in ImageSets/Segmentation/{train_aug,val}.txt (lists.py has
their forms). An optional classes.txt names the classes, one per line from class 1; without it the twenty of PASCAL VOC
are meant. A data set of one's own is known by its folder's name.
"""

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino.data.dataset import Dataset, Split
from fsdino.data.lists import parse_classes, parse_ids
from fsdino.data.masks import read_label
from fsdino.errors import DataError, UserError, reachable
from fsdino.preprocess import SUFFIXES, Source

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
JPEGS = (".jpg", ".jpeg")
_LIST = {"train": "train_aug", "val": "val"}


class VocDataset(Dataset):
    """Images, labels and folds of one root."""

    def __init__(self, root: Source):
        with reachable(root):
            self.root = UPath(root)
            if not (self.root / "ImageSets" / "Segmentation").is_dir():
                raise UserError(
                    f"{self.root}: expected a data set in VOC's layout, found no ImageSets/Segmentation; "
                    "name the folder that holds JPEGImages"
                )
            names = self.root / "classes.txt"
            own = names.exists()
            self.class_names = parse_classes(str(names), names.read_bytes()) if own else list(VOC_CLASSES)
        self.name = self.root.resolve().name if own else "pascal-5i"
        self._ids: dict[Split, list[str]] = {}
        self._photographs: dict[str, dict[str, str]] = {}  # of each folder: stem to name; of several the JPEG

    def ids(self, split: Split) -> list[str]:
        """See Dataset."""
        if split not in self._ids:
            path = self.root / "ImageSets" / "Segmentation" / f"{_LIST[split]}.txt"
            with reachable(path):
                try:
                    self._ids[split] = parse_ids(str(path), path.read_bytes())
                except FileNotFoundError:
                    raise DataError(
                        f"{path}: expected the list of {split} images, found none; VOC's layout needs it"
                    ) from None
        return list(self._ids[split])

    def source(self, image_id: str) -> str:
        """See Dataset. A photograph that is not there is a JPEG."""
        inner, _, stem = image_id.rpartition("/")
        folder = self.root / "JPEGImages" / inner if inner else self.root / "JPEGImages"
        if inner not in self._photographs:
            with reachable(folder):
                names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            known = sorted((n for n in names if _suffix(n) in SUFFIXES), key=lambda n: (_suffix(n) in JPEGS, n))
            self._photographs[inner] = {name.rsplit(".", 1)[0]: name for name in known}
        return str(folder / self._photographs[inner].get(stem, f"{stem}.jpg"))

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "SegmentationClassAug" / f"{image_id}.png")

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        return read_label(self.label_source(image_id))


def _suffix(name: str) -> str:
    return "." + name.rsplit(".", 1)[-1].lower()
