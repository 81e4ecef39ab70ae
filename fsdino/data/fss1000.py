"""FSS-1000 in the publisher's layout: a folder for each of 1,000 classes with 1.jpg ... 10.jpg and 1.png ... 10.png.

Masks are foreground from 128 up. The test classes are those of fss_test_set.txt or test.txt (one name a line, as the
publishers' list), found in the root or beside it; all other classes train; those in val.txt are used for neither.
Each of the ten images of a test class is a query once. Without a list every class is a test class.
"""

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino.data.dataset import Dataset, LabelSummary, Split
from fsdino.data.folds import Folds
from fsdino.data.lists import parse_classes
from fsdino.errors import DataError, reachable
from fsdino.kinds import Kind
from fsdino.preprocess import Source, decoded

THRESHOLD = 128
MOST = 10_000  # classes: each image has but one, so no map limits their number
IMAGES = sorted(map(str, range(1, 11)))  # of each class, in the order of HSNet's test
LISTS: dict[str, tuple[str, ...]] = {"test": ("fss_test_set.txt", "test.txt"), "val": ("fss_val_set.txt", "val.txt")}


class Fss1000Dataset(Dataset):
    """Images, masks and the one split of classes."""

    kinds = ("fss1000",)
    layout = "a folder for each class with 1.jpg, 1.png, 2.jpg, ..."
    name = "fss-1000"
    min_pixels = 1
    each_image_once = True

    def __init__(self, root: Source, kind: Kind = "fss1000"):
        super().__init__(root, kind)
        with reachable(self.root):
            folders = (path.name for path in self.root.iterdir() if path.is_dir())
            self.class_names = sorted(name for name in folders if not name.startswith((".", "__")))  # programs' own
            lists = {name: _listed(self.root, files) for name, files in LISTS.items()}
        test, val = lists["test"] or self.class_names, lists["val"] or []
        unknown = [name for name in (*test, *val) if name not in self.class_names]
        if unknown:
            lists_read = ", ".join(file for files in LISTS.values() for file in files)
            raise DataError(
                f"{root}: expected a folder for each class of its lists ({lists_read}, here or in the folder above), "
                f"found none for {', '.join(unknown[:8])}"
            )
        self._number = {name: number for number, name in enumerate(self.class_names, start=1)}
        self._test = [name for name in self.class_names if name in set(test)]
        self.splits = ("train", "val") if {*test, *val} != set(self.class_names) else ("val",)
        self._train = [name for name in self.class_names if name not in {*test, *val}]

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        first = next((path for path in root.iterdir() if path.is_dir()), None)
        return ["fss1000"] if first and (first / "1.jpg").exists() and (first / "1.png").exists() else []

    def split_classes(self) -> Folds:
        """See Dataset."""
        tested, trained = (tuple(self._number[name] for name in names) for names in (self._test, self._train))
        return Folds("published" if self._train else "all classes", (tested,), trained)

    def own_ids(self, split: Split) -> list[str]:
        """See Dataset. Ids are CLASS/NUMBER, by class."""
        return [f"{name}/{i}" for name in (self._train if split == "train" else self._test) for i in IMAGES]

    def source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / f"{image_id}.jpg")

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / f"{image_id}.png")

    def mask(self, image_id: str, class_id: int) -> UInt8[np.ndarray, "h w"]:
        """See Dataset. A class other than the image's own has no pixel."""
        foreground = self._foreground(image_id)
        return foreground if self._class_of(image_id) == class_id else np.zeros_like(foreground)

    def summary(self, image_id: str) -> LabelSummary:
        """See Dataset."""
        foreground = self._foreground(image_id)
        height, width = foreground.shape
        return LabelSummary.of_masks((width, height), {self._class_of(image_id): foreground})

    def _class_of(self, image_id: str) -> int:
        name = image_id.split("/")[0]
        if name not in self._number:
            raise DataError(f"{self.root}: image {image_id!r} is of no class; correct the list")
        return self._number[name]

    def _foreground(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        image = decoded(self.label_source(image_id))
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(
                f"{self.label_source(image_id)}: expected a mask of 8 bits, got {image.mode}; save it as such"
            )
        return (np.asarray(image.convert("L")) >= THRESHOLD).astype(np.uint8)


def _listed(root: UPath, files: tuple[str, ...]) -> list[str] | None:
    """The classes of the first of these lists that is in the root or beside it."""
    for path in (folder / file for folder in (root, root.parent) for file in files):
        if path.exists():
            return parse_classes(str(path), path.read_bytes(), MOST)
    return None
