"""Data sets in VOC's layout.

A root (a path or any fsspec URL) holds JPEGImages/*.jpg, SegmentationClassAug/*.png (palette index = class, 255 =
void), and lists of ids in ImageSets/Segmentation/{train_aug,val}.txt. An optional classes.txt names the classes, one
per line from class 1; without it the twenty of PASCAL VOC are meant. A data set of one's own is known by its folder's
name.
"""

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino.data.dataset import Dataset, Split
from fsdino.data.masks import read_label
from fsdino.errors import UserError
from fsdino.preprocess import Source

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
_LIST = {"train": "train_aug", "val": "val"}


class VocDataset(Dataset):
    """Images, labels and folds of one root."""

    def __init__(self, root: Source):
        self.root = UPath(root)
        if not (self.root / "ImageSets" / "Segmentation").is_dir():
            raise UserError(
                f"{self.root}: expected a data set in VOC's layout, found no ImageSets/Segmentation; "
                "name the folder that holds JPEGImages"
            )
        names = self.root / "classes.txt"
        own = names.exists()
        self.class_names = names.read_text().strip().splitlines() if own else list(VOC_CLASSES)
        self.name = self.root.resolve().name if own else "pascal-5i"

    def ids(self, split: Split) -> list[str]:
        """See Dataset."""
        path = self.root / "ImageSets" / "Segmentation" / f"{_LIST[split]}.txt"
        if not path.exists():
            raise UserError(f"{path}: expected the list of {split} images, found none; VOC's layout needs it")
        return path.read_text().split()

    def source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "JPEGImages" / f"{image_id}.jpg")

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "SegmentationClassAug" / f"{image_id}.png")

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        return read_label(self.label_source(image_id))
