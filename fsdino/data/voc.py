"""Data sets in VOC's layout.

A root (a path or any fsspec URL) holds JPEGImages (JPEG, or any other kind of photograph), SegmentationClassAug/*.png
(palette index = class, 255 = void), and lists of images in ImageSets/Segmentation/{train_aug,val}.txt (lists.py has
their forms). An optional classes.txt names the classes, one per line from class 1; without it the twenty of PASCAL VOC
are meant. A data set of one's own is known by its folder's name; its folds are blocks, COCO-20i's if its classes are
COCO's, or those of folds.txt.

PASCAL VOC 2012 and SBD also as their publishers ship them: without SegmentationClassAug, labels are those of
SegmentationClass, and of SBD's cls/*.mat for the other images. SBD (its folder `dataset`, with cls, train.txt and
val.txt) is looked for as SBD or benchmark_RELEASE/dataset in VOC's folder and in the two above it. Without
train_aug.txt the training list is VOC's train and SBD's train without VOC's val.
"""

import io

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino import paper
from fsdino.data.coco import COCO_CLASSES
from fsdino.data.dataset import LabelledDataset, Split
from fsdino.data.folds import Folds, blocks, interleaved, parse_folds
from fsdino.data.lists import parse_classes, parse_ids
from fsdino.data.masks import read_label
from fsdino.errors import DataError, first_line, reachable
from fsdino.kinds import Kind
from fsdino.preprocess import SUFFIXES, Source

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
JPEGS = (".jpg", ".jpeg")
_LIST = {"train": "train_aug", "val": "val"}
SBD_PLACES = ("SBD", "sbd", "benchmark_RELEASE/dataset")


class VocDataset(LabelledDataset):
    """Images, labels and folds of one root."""

    kinds = ("voc",)
    layout = "JPEGImages and ImageSets/Segmentation"

    def __init__(self, root: Source, kind: Kind = "voc"):
        super().__init__(root, kind)
        with reachable(self.root):
            names = self.root / "classes.txt"
            self._own = names.exists()
            self.class_names = parse_classes(str(names), names.read_bytes()) if self._own else list(VOC_CLASSES)
            augmented = (self.root / "SegmentationClassAug").is_dir()
            self._sbd = None if augmented else _sbd(self.root)
            self._voc_labels = None if augmented else {path.stem for path in _listed(self.root / "SegmentationClass")}
        self.name = self.root.resolve().name if self._own else "pascal-5i"
        self.is_coco = self.class_names == list(COCO_CLASSES)
        self._ids: dict[Split, list[str]] = {}
        self._photographs: dict[str, dict[str, str]] = {}  # of each folder: stem to name; of several the JPEG

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        return ["voc"] if (root / "ImageSets" / "Segmentation").is_dir() else []

    def split_classes(self) -> Folds:
        """See Dataset."""
        path = self.root / "folds.txt"
        with reachable(path):
            if self._own and path.exists():
                return parse_folds(str(path), path.read_bytes(), self.class_names)
        return (interleaved if self.is_coco else blocks)(len(self.class_names))

    def own_ids(self, split: Split) -> list[str]:
        """See Dataset."""
        if split not in self._ids:
            path = self.root / "ImageSets" / "Segmentation" / f"{_LIST[split]}.txt"
            derived = split == "train" and self._sbd is not None and not path.exists()
            self._ids[split] = self._derived() if derived else _read_list(path)
        return self._ids[split]

    def _derived(self) -> list[str]:
        """VOC's train and SBD's train without VOC's val."""
        assert self._sbd is not None
        lists = self.root / "ImageSets" / "Segmentation"
        val = set(self.own_ids("val"))
        both = dict.fromkeys([*_read_list(lists / "train.txt"), *_read_list(self._sbd / "train.txt")])
        ids = sorted(image_id for image_id in both if image_id not in val)
        if not self._own and len(ids) != paper.PASCAL_TRAIN_IMAGES:
            raise DataError(
                f"{self.root}: expected {paper.PASCAL_TRAIN_IMAGES} training images (VOC's train and SBD's train "
                f"without VOC's val), got {len(ids)}; check train.txt and val.txt of {lists} and {self._sbd}, or "
                "write a list of your own, train_aug.txt"
            )
        return ids

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
        if self._voc_labels is None:
            return str(self.root / "SegmentationClassAug" / f"{image_id}.png")
        if self._sbd is None or image_id in self._voc_labels:
            return str(self.root / "SegmentationClass" / f"{image_id}.png")
        return str(self._sbd / "cls" / f"{image_id}.mat")

    def label(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """See Dataset."""
        source = self.label_source(image_id)
        return read_sbd_label(source) if source.endswith(".mat") else read_label(source)


def read_sbd_label(path: str) -> UInt8[np.ndarray, "h w"]:
    """The class map of SBD's MATLAB file: field Segmentation of its struct GTcls. Raises DataError if it is none."""
    from scipy.io import loadmat

    try:
        with reachable(path):
            data = UPath(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: expected SBD's label of an image, found nothing there; check the path") from None
    try:
        return np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0], np.uint8)
    except Exception as error:  # SciPy raises OSError, zlib.error, errors of its own and more
        raise DataError(
            f"{path}: expected SBD's label (a MATLAB file with GTcls.Segmentation), got: {first_line(error)}; download "
            "it again"
        ) from None


def _read_list(path: UPath) -> list[str]:
    with reachable(path):
        try:
            return parse_ids(str(path), path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{path}: expected a list of images, found none; VOC's layout needs it (a training list also follows "
                "from SBD's folder `dataset`, as SBD beside VOC's)"
            ) from None


def _sbd(root: UPath) -> UPath | None:
    """SBD's folder near VOC's, None if there is none."""
    places = (base / name for base in (root, root.parent, root.parent.parent) for name in SBD_PLACES)
    return next((place for place in places if (place / "cls").is_dir()), None)


def _listed(folder: UPath) -> list[UPath]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _suffix(name: str) -> str:
    return "." + name.rsplit(".", 1)[-1].lower()
