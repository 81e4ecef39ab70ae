"""COCO 2014 and 2017 in the publisher's layout, and COCO-20i's folds.

A root (a path or any fsspec URL) holds annotations/instances_{train,val}YEAR.json and the photographs in trainYEAR and
valYEAR. Class maps are drawn from the instances when they are read (instances.py has the rules). The benchmark uses
2014's images: those of train for training, those of val for the test.
"""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino.data.dataset import LabelledDataset, Split
from fsdino.data.folds import Folds, interleaved
from fsdino.data.instances import Instances, read_instances
from fsdino.errors import DataError
from fsdino.kinds import Kind
from fsdino.preprocess import Source

COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
SPLITS: tuple[Split, ...] = ("val", "train")
YEARS: dict[Kind, str] = {"coco2014": "2014", "coco2017": "2017"}


class CocoDataset(LabelledDataset):
    """Images, class maps and folds of one year."""

    kinds = ("coco2014", "coco2017")
    layout = "annotations/instances_{train,val}YEAR.json, trainYEAR and valYEAR"
    is_coco = True

    def __init__(self, root: Source, kind: Kind):
        super().__init__(root, kind)
        self.year = YEARS[kind]
        self._read: dict[Split, Instances] = {}
        self._of_id: dict[Split, dict[str, int]] = {}
        self.class_names = self._instances("val").class_names
        self.name = "coco-20i" if self.year == "2014" else f"coco-20i-{self.year}"

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        return [kind for kind in cls.kinds if _json(root, "val", YEARS[kind]).exists()]

    def split_classes(self) -> Folds:
        """See Dataset."""
        return interleaved(len(self.class_names))

    def own_ids(self, split: Split) -> list[str]:
        """See Dataset. Ids are file names without suffix, in the JSON's order."""
        return list(self._numbers(split))

    def source(self, image_id: str) -> str:
        """See Dataset."""
        split, number = self._place(image_id)
        return str(self.root / f"{split}{self.year}" / self._instances(split).names[number])

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(_json(self.root, self._place(image_id)[0], self.year))

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        split, number = self._place(image_id)
        return self._instances(split).label(number)

    def notes(self) -> list[str]:
        """See Dataset."""
        of = {split: str(_json(self.root, split, self.year)) for split in SPLITS}
        return [note for split in SPLITS for note in self._instances(split).notes(of[split])]

    def _instances(self, split: Split) -> Instances:
        if split not in self._read:
            path = _json(self.root, split, self.year)
            try:
                self._read[split] = read_instances(path)
            except FileNotFoundError:
                raise DataError(f"{path}: expected the annotations of {split}, found none; download them") from None
            if split == "train" and self._read[split].class_names != self.class_names:
                raise DataError(f"{path}: expected the categories of val, got others")
        return self._read[split]

    def _numbers(self, split: Split) -> dict[str, int]:
        """Image id to its number in the split's annotations."""
        if split not in self._of_id:
            self._of_id[split] = {name.rsplit(".", 1)[0]: i for i, name in enumerate(self._instances(split).names)}
        return self._of_id[split]

    def _place(self, image_id: str) -> tuple[Split, int]:
        for split in SPLITS:
            if _json(self.root, split, self.year).exists() and image_id in self._numbers(split):
                return split, self._numbers(split)[image_id]
        raise DataError(f"{self.root}: image {image_id!r} is in no annotations of {self.year}; correct the list")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_read": {}, "_of_id": {}}


def _json(root: UPath, split: Split, year: str) -> UPath:
    return root / "annotations" / f"instances_{split}{year}.json"
