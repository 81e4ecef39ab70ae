"""What `predict` writes of what it found: pictures beside each other, or the files that labelling tools read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from pipelines import panels

Format = Literal["mask", "labels", "overlay", "probability", "coco", "yolo"]
COCO, YOLO_CLASSES = "annotations.json", "classes.txt"


@dataclass(frozen=True)
class Found:
    """What one photograph shows: n classes at its own size."""

    query: str
    """Path or URL."""
    stem: str
    """What its files are called."""
    image: Image.Image
    logits: np.ndarray
    """(n, h, w) float32."""
    scores: np.ndarray
    """(n,): mean probability within each mask."""

    @property
    def masks(self) -> np.ndarray:
        """(n, h, w) bool; masks of several classes may overlap."""
        return self.logits > 0

    @property
    def labels(self) -> np.ndarray:
        """(h, w): 1 to n, the class of the largest logit; 0 where none is above 0."""
        return np.where(self.logits.max(0) > 0, self.logits.argmax(0) + 1, 0).astype(np.uint8)

    @property
    def apart(self) -> np.ndarray:
        """As `masks`, but each pixel of one class alone."""
        return self.labels == np.arange(1, len(self.logits) + 1)[:, None, None]


class Writer(Protocol):
    """Takes photographs one after another."""

    def add(self, found: Found) -> list[Path]:
        """Write what belongs to one photograph. The files that are its own."""
        ...

    def close(self) -> list[Path]:
        """Write what belongs to all."""
        ...


class Pictures:
    """A file for each photograph, or for each of its classes."""

    def __init__(self, out: Path, names: Sequence[str], suffix: str, of: Callable[[Found, int], Any], each: bool):
        self.out, self.names, self.suffix, self.of, self.each = out, names, suffix, of, each

    def paths(self, stem: str) -> list[Path]:
        """The files of one photograph."""
        several = [f"_{_plain(name)}" for name in self.names] if self.each and len(self.names) > 1 else [""]
        return [self.out / f"{stem}{of_class}{self.suffix}" for of_class in several]

    def add(self, found: Found) -> list[Path]:
        """See Writer."""
        paths = self.paths(found.stem)
        for number, path in enumerate(paths):
            self.of(found, number).save(path)
        return paths

    def close(self) -> list[Path]:
        """See Writer."""
        return []


class Coco:
    """One JSON of COCO's result and annotation form: column-major run lengths, boxes, areas, scores."""

    def __init__(self, out: Path, names: Sequence[str], instances: bool):
        self.path, self.instances = out / COCO, instances
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        self.record: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, found: Found) -> list[Path]:
        """See Writer."""
        from pycocotools import mask as coco

        images, annotations = self.record["images"], self.record["annotations"]
        width, height = found.image.size
        images.append({"id": len(images) + 1, "file_name": found.query, "width": width, "height": height})
        for number, whole in enumerate(found.masks):
            for part in parts(whole, self.instances):
                runs = coco.encode(np.asfortranarray(part, np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": number + 1,
                        "segmentation": {"size": [height, width], "counts": runs["counts"].decode()},
                        "area": int(part.sum()),
                        "bbox": [float(side) for side in coco.toBbox(runs)],
                        "iscrowd": 0,
                        "score": round(float(_sigmoid(found.logits[number][part]).mean()), 6),
                    }
                )
        return []

    def close(self) -> list[Path]:
        """See Writer."""
        self.path.write_text(json.dumps(self.record))
        return [self.path]


class Yolo:
    """A text file for each photograph: on each line a class number and an outline in shares of width and height.

    The format has no holes, and one outline a line: of each connected part it gets the outer one.
    """

    def __init__(self, out: Path, names: Sequence[str]):
        self.out, self.names = out, names

    def paths(self, stem: str) -> list[Path]:
        """The files of one photograph."""
        return [self.out / f"{stem}.txt"]

    def add(self, found: Found) -> list[Path]:
        """See Writer."""
        lines = [
            " ".join([str(number), *(f"{share:.6f}" for point in outline(part) for share in point)])
            for number, whole in enumerate(found.masks)
            for part in parts(whole, instances=True)
        ]
        (path,) = self.paths(found.stem)
        path.write_text("".join(f"{line}\n" for line in lines))
        return [path]

    def close(self) -> list[Path]:
        """See Writer."""
        path = self.out / YOLO_CLASSES
        path.write_text("".join(f"{name}\n" for name in self.names))
        return [path]


def writers(formats: Sequence[Format], out: Path, names: Sequence[str], instances: bool) -> list[Writer]:
    """One for each format."""
    made: dict[str, Callable[[], Writer]] = {
        "mask": lambda: Pictures(out, names, ".png", lambda f, n: _binary(f.masks[n]), each=True),
        "labels": lambda: Pictures(out, names, "_labels.png", lambda f, _: _labels(f.labels), each=False),
        "overlay": lambda: Pictures(out, names, "_overlay.jpg", lambda f, _: _overlay(f, names), each=False),
        "probability": lambda: Pictures(out, names, "_probability.png", lambda f, n: _grey(f.logits[n]), each=True),
        "coco": lambda: Coco(out, names, instances),
        "yolo": lambda: Yolo(out, names),
    }
    return [made[name]() for name in dict.fromkeys(formats)]


def parts(mask: np.ndarray, instances: bool) -> list[np.ndarray]:
    """The mask, or its parts that are connected by pixels' sides; nothing of an empty one."""
    if not instances:
        return [mask] if mask.any() else []
    numbers, count = ndimage.label(mask)
    return [numbers == number for number in range(1, count + 1)]


def outline(part: np.ndarray) -> np.ndarray:
    """The outer outline (points, 2) of a part, along the sides of its pixels, as shares of width and height."""
    import contourpy

    height, width = part.shape
    whole = np.pad(ndimage.binary_fill_holes(part), 1).astype(np.float64)
    centres = np.arange(width + 2) - 0.5, np.arange(height + 2) - 0.5
    lines: list[np.ndarray] = contourpy.contour_generator(*centres, whole).lines(0.5)  # type: ignore[assignment]
    longest = max(lines, key=len)
    return np.clip(longest[:-1] / (width, height), 0, 1)


def _binary(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _labels(labels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(labels)
    picture.putpalette([0, 0, 0, *(value for colour in panels.COLOURS for value in colour)])
    return picture


def _grey(logits: np.ndarray) -> Image.Image:
    return Image.fromarray((_sigmoid(logits) * 65535).round().astype(np.uint16))


def _overlay(found: Found, names: Sequence[str]) -> Image.Image:
    captions = [f"{name} {score:.2f}" for name, score in zip(names, found.scores, strict=True)]
    return panels.overlaid(found.image, found.apart, captions)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _plain(name: str) -> str:
    """A class's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)
