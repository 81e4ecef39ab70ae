"""DAVIS 2016 and 2017 in the publishers' layout: videos, in which an object of the first frame is found again.

A root (a path or any fsspec URL) holds JPEGImages/480p/VIDEO/*.jpg, Annotations/480p/VIDEO/*.png and lists of videos:
ImageSets/2016/{train,val}.txt (or ImageSets/480p, whose lines are frames) and ImageSets/2017/{train,val}.txt. In 2016 a
video has one object, in 2017 each of its numbers is one. Every object of the val videos is a class of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from upath import UPath

from fsdino import paper
from fsdino.data.dataset import Dataset, LabelSummary, Split
from fsdino.data.folds import Folds
from fsdino.data.masks import binary_label
from fsdino.errors import DataError, UserError, reachable
from fsdino.kinds import Kind
from fsdino.preprocess import Source, decoded

LISTS: dict[Kind, tuple[str, ...]] = {"davis2016": ("2016", "480p"), "davis2017": ("2017",)}


class Video(NamedTuple):
    """The frames of a video, and the class ids of its objects."""

    name: str
    frames: tuple[str, ...]
    objects: tuple[int, ...]


class DavisDataset(Dataset):
    """Frames and objects of one year's benchmark."""

    kinds = ("davis2016", "davis2017")
    layout = "JPEGImages/480p, Annotations/480p and ImageSets/YEAR/val.txt"
    min_pixels = 1
    splits = ("val",)  # its objects are no classes that could be trained

    def __init__(self, root: Source, kind: Kind):
        super().__init__(root, kind)
        self.name = kind.replace("davis", "davis-")
        self._lists: dict[Split, dict[str, tuple[str, ...]]] = {"val": self._frames("val")}
        with reachable(self.root):
            numbers = {video: self._numbers(frames[0]) for video, frames in self._lists["val"].items()}
        self._objects = [(video, number) for video, of_video in numbers.items() for number in of_video]
        self.class_names = [video if kind == "davis2016" else f"{video}/{number}" for video, number in self._objects]

    @classmethod
    def kinds_at(cls, root: UPath) -> list[Kind]:
        """See Dataset."""
        if not (root / "Annotations" / "480p").is_dir():
            return []
        return [kind for kind in cls.kinds if _list(root, kind, "val") is not None]

    @property
    def videos(self) -> list[Video]:
        """Of the val list, in its order."""
        frames: dict[str, list[str]] = {}
        for image_id in self.ids("val"):
            frames.setdefault(image_id.rsplit("/", 1)[0], []).append(image_id)
        short = next((video for video, of_video in frames.items() if len(of_video) < 3), None)
        if short is not None:
            raise DataError(
                f"{self.root}: video {short}: expected three frames or more, as its ends are not scored, got "
                f"{len(frames[short])}"
            )
        objects = {video: tuple(c for c, (of, _) in self._numbered() if of == video) for video in frames}
        return [Video(video, tuple(of_video), objects[video]) for video, of_video in frames.items()]

    def split_classes(self) -> Folds:
        """See Dataset. One fold, which trains nothing."""
        return Folds("objects of videos", (tuple(self.class_ids),), ())

    def own_ids(self, split: Split) -> list[str]:
        """See Dataset. Ids are VIDEO/FRAME."""
        if split not in self._lists:
            self._lists[split] = self._frames(split)
        return [frame for frames in self._lists[split].values() for frame in frames]

    def source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "JPEGImages" / "480p" / f"{image_id}.jpg")

    def label_source(self, image_id: str) -> str:
        """See Dataset."""
        return str(self.root / "Annotations" / "480p" / f"{image_id}.png")

    def mask(self, image_id: str, class_id: int) -> UInt8[np.ndarray, "h w"]:
        """See Dataset. An object of another video has no pixel."""
        video, number = self._objects[class_id - 1]
        annotation = self._annotation(image_id)
        return binary_label(annotation, number) if image_id.rsplit("/", 1)[0] == video else np.zeros_like(annotation)

    def summary(self, image_id: str) -> LabelSummary:
        """See Dataset."""
        annotation = self._annotation(image_id)
        height, width = annotation.shape
        of_video = {number: c for c, (video, number) in self._numbered() if video == image_id.rsplit("/", 1)[0]}
        masks = {c: (annotation == number).astype(np.uint8) for number, c in of_video.items()}
        return LabelSummary.of_masks((width, height), masks)

    def notes(self) -> list[str]:
        """See Dataset. Objects that the first frame does not show, which the benchmark does not score."""
        found = []
        for video in self.videos:
            known = {number for of, number in self._objects if of == video.name}
            for frame in video.frames[1:]:
                try:
                    later = set(np.unique(self._annotation(frame)).tolist()) - known - {0, paper.VOID}
                except UserError:  # an annotation that cannot be read is told elsewhere
                    continue
                if later:
                    place = self.label_source(frame)
                    found.append(f"{place}: object {min(later)} is not in the first frame: not scored")
                    break
        return found

    def _numbered(self) -> list[tuple[int, tuple[str, int]]]:
        """Class id, video and number of each object."""
        return list(enumerate(self._objects, start=1))

    def _numbers(self, frame: str) -> list[int]:
        """Numbers of the objects in a video's first frame."""
        numbers = [int(n) for n in np.unique(self._annotation(frame)) if n not in (0, paper.VOID)]
        if not numbers:
            raise DataError(f"{self.label_source(frame)}: expected an object in the first frame, got none")
        return numbers

    def _annotation(self, image_id: str) -> UInt8[np.ndarray, "h w"]:
        """Numbers of the objects; in 2016 whatever is not background is object 1."""
        image = decoded(self.label_source(image_id))
        values = np.asarray(image if image.mode in ("P", "L", "1") else image.convert("L"))
        return ((values > 0) if self.kind == "davis2016" else values).astype(np.uint8)

    def _frames(self, split: Split) -> dict[str, tuple[str, ...]]:
        """Frames of each video of a list."""
        path = _list(self.root, self.kind, split)
        if path is None:
            raise DataError(f"{self.root}: expected a list of {split} videos in ImageSets, found none")
        with reachable(path):
            lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        videos = list(dict.fromkeys(_video(line) for line in lines if line))
        found = {}
        for video in videos:
            folder = self.root / "JPEGImages" / "480p" / video
            with reachable(folder):
                names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            stems = [name.removesuffix(".jpg") for name in names if name.endswith(".jpg")]
            frames = sorted(stems, key=lambda stem: (len(stem), stem) if stem.isdigit() else (0, stem))
            if not frames:
                raise DataError(f"{path}: video {video}: expected frames in {folder}, found none; download them")
            found[video] = tuple(f"{video}/{frame}" for frame in frames)
        if not found:
            raise DataError(f"{path}: expected names of videos, one a line, got none")
        return found


def _video(line: Sequence[str]) -> str:
    """The video that a list's line names, also where it names a frame's photograph and annotation."""
    return line[0].strip("/").split("/")[-2] if "/" in line[0].strip("/") else line[0]


def _list(root: UPath, kind: Kind, split: Split) -> UPath | None:
    paths = (root / "ImageSets" / folder / f"{split}.txt" for folder in LISTS[kind])
    return next((path for path in paths if path.exists()), None)
