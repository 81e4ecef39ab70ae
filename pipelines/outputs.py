"""What `predict` writes of what it found: pictures beside each other, or the files that labelling tools read."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from feature_store.urls import is_url, redacted
from fsdino.errors import UserError
from pipelines import geo, panels, videos
from pipelines.checks import Format
from pipelines.examples import check_names, plain

COCO, YOLO_CLASSES, FILM = "annotations.json", "classes.txt", "film.mp4"
Part = tuple[tuple[slice, ...], np.ndarray]
"""Where a mask's part lies, and the part itself (h, w) bool."""


@dataclass(frozen=True)
class Found:
    """What one photograph shows: n classes at its own size."""

    query: str
    """Path or URL."""
    stem: str
    """What its files are called."""
    image: Image.Image
    logits: np.ndarray
    """(n, h, w) float32, or float16 of a photograph that was looked at in tiles."""
    scores: np.ndarray
    """(n,), as the predictor's."""
    lag: np.ndarray
    """(n,), likewise."""

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """(n, h, w) bool; masks of several classes may overlap."""
        return self.logits > 0

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(h, w): 1 to n, of the classes whose logit is above 0 the one with the largest less its lag; 0 where there is
        none."""
        found = np.zeros(self.logits.shape[1:], np.uint8)
        for top in range(0, len(found), panels.ROWS):  # so that no second copy of a large photograph's logits is made
            rows = slice(top, top + panels.ROWS)
            best = np.full_like(self.logits[0, rows], -np.inf)
            for number, (logits, behind) in enumerate(zip(self.logits[:, rows], self.lag, strict=True), start=1):
                mine = (logits > 0) & (logits - float(behind) > best)
                found[rows][mine], best[mine] = number, logits[mine] - float(behind)
        return found

    @functools.cached_property
    def apart(self) -> np.ndarray:
        """As `masks`, but each pixel of one class alone."""
        return self.labels == np.arange(1, len(self.logits) + 1)[:, None, None]


class Writer(Protocol):
    """Takes photographs one after another."""

    shared: list[Path]
    """The files that belong to all photographs."""

    def paths(self, stem: str) -> list[Path]:
        """The files of one photograph."""
        ...

    def add(self, found: Found) -> None:
        """Write what belongs to one photograph."""
        ...

    def close(self) -> None:
        """Write what belongs to all."""
        ...


class Pictures:
    """A file for each photograph, or for each of its classes."""

    def __init__(self, out: Path, names: Sequence[str], suffix: str, of: Callable[[Found, int], Any], each: bool):
        self.out, self.suffix, self.of = out, suffix, of
        self.shared: list[Path] = []
        self.of_classes = [f"_{plain(name)}" for name in names] if each and len(names) > 1 else [""]

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return [self.out / f"{stem}{of_class}{self.suffix}" for of_class in self.of_classes]

    def add(self, found: Found) -> None:
        """See Writer."""
        for number, path in enumerate(self.paths(found.stem)):
            self.of(found, number).save(path)

    def close(self) -> None:
        """See Writer."""


class Coco:
    """One JSON of COCO's result and annotation form: column-major run lengths, boxes, areas, scores."""

    def __init__(self, out: Path, names: Sequence[str], instances: bool):
        self.shared, self.instances = [out / COCO], instances
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        self.record: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return []

    def add(self, found: Found) -> None:
        """See Writer."""
        images, annotations = self.record["images"], self.record["annotations"]
        width, height = found.image.size
        images.append({"id": len(images) + 1, "file_name": redacted(found.query), "width": width, "height": height})
        for number, (whole, logits) in enumerate(zip(found.masks, found.logits, strict=True), start=1):
            for place, part in parts(whole, self.instances):
                record = coco_record(place, part, logits)
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": len(images), "category_id": number, **record}
                )

    def close(self) -> None:
        """See Writer."""
        self.shared[0].write_text(json.dumps(self.record))


class Yolo:
    """A text file for each photograph: on each line a class number and an outline in shares of width and height.

    The format has no holes, and one outline a line: of each connected part it gets the outer one.
    """

    def __init__(self, out: Path, names: Sequence[str]):
        self.out, self.names, self.shared = out, names, [out / YOLO_CLASSES]

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return [self.out / f"{stem}.txt"]

    def add(self, found: Found) -> None:
        """See Writer."""
        lines = [
            " ".join([str(number), *(f"{share:.6f}" for point in outline(*of, whole.shape) for share in point)])
            for number, whole in enumerate(found.masks)
            for of in parts(whole, instances=True)
        ]
        self.paths(found.stem)[0].write_text("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """See Writer."""
        self.shared[0].write_text("".join(f"{name}\n" for name in self.names))


class Video:
    """All photographs, or a video's frames, with their masks as one film."""

    def __init__(self, out: Path, names: Sequence[str], rate: Fraction):
        self.names, self.shared = names, [out / FILM]
        self.rate = rate
        self.film: videos.Film | None = None

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return []

    def add(self, found: Found) -> None:
        """See Writer."""
        if self.film is None:
            self.film = videos.Film(self.shared[0], self.rate)
        self.film.add(overlay(found, self.names))

    def close(self) -> None:
        """See Writer."""
        if self.film is not None:
            self.film.close()


def writers(
    formats: Sequence[Format], out: Path, names: Sequence[str], instances: bool, rate: Fraction = videos.FRAME_RATE
) -> list[Writer]:
    """One for each format; `rate` in frames a second.

    Raises UserError for classes whose files could not be told apart.
    """
    check_names(names)
    made: dict[str, Callable[[], Writer]] = {
        "mask": lambda: Pictures(out, names, ".png", lambda f, n: _binary(f.masks[n]), each=True),
        "labels": lambda: Pictures(out, names, "_labels.png", lambda f, _: labels(f), each=False),
        "overlay": lambda: Pictures(out, names, "_overlay.jpg", lambda f, _: overlay(f, names), each=False),
        "probability": lambda: Pictures(out, names, "_probability.png", lambda f, n: _grey(f.logits[n]), each=True),
        "coco": lambda: Coco(out, names, instances),
        "yolo": lambda: Yolo(out, names),
        "video": lambda: Video(out, names, rate),
        "geotiff": lambda: geo.GeoTiff(out, names),
        "geojson": lambda: geo.GeoJson(out, names),
    }
    return [made[name]() for name in dict.fromkeys(formats)]


def stems(queries: Sequence[str], made: Sequence[Writer], others: Sequence[Path], inputs: Sequence[str]) -> list[str]:
    """What the files of each photograph are called, numbered where one of them is taken; `others` are written too.

    Raises UserError if anything that is written would replace an input.
    """
    given = {Path(path).resolve(): path for path in inputs if not is_url(path)}
    ours = any(path.exists() for path in others)  # an earlier run's folder, whose files may be replaced

    def check(path: Path, query: str) -> None:
        if path.resolve() in given:
            what = f"what is written for {query}" if query else path.name
            raise UserError(
                f"--out {path.parent}: {what} would overwrite the input {given[path.resolve()]}; choose another folder"
            )
        if path.exists() and not ours:
            raise UserError(
                f"--out {path.parent}: {path.name} is there, and not of an earlier run; choose another folder"
            )

    taken = {*others, *(path for writer in made for path in writer.shared)}
    for path in taken:
        check(path, "")
    found, used = list[str](), set[str]()
    for query in queries:
        stem = stem_of(query)
        for numbered in chain([stem], (f"{stem}-{n}" for n in count(2))):
            paths = [path for writer in made for path in writer.paths(numbered)]
            if len(set(paths)) == len(paths) and not taken & set(paths) and numbered not in used:
                break
            if len(set(paths)) < len(paths):
                raise UserError(f"--format: two of them write {paths[-1].name}; call the class otherwise")
        for path in paths:
            check(path, query)
        taken |= set(paths)
        found.append(numbered)
        used.add(numbered)
    return found


def stem_of(query: str) -> str:
    """A photograph's name without its suffix; a video's frame's with its number."""
    path, _, number = query.rpartition("#")
    return f"{Path(path).stem}_{number}" if videos.is_frame(query) else Path(query).stem


def parts(mask: np.ndarray, instances: bool) -> Iterator[Part]:
    """The mask, or its parts that are connected by pixels' sides; nothing of an empty one."""
    numbers = ndimage.label(mask)[0] if instances else mask.astype(np.int32)
    for number, place in enumerate(ndimage.find_objects(numbers), start=1):
        yield place, numbers[place] == number


def coco_record(place: tuple[slice, ...], part: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """A part of a mask as COCO has it, of a photograph of the size of `logits` (h, w): column-major run lengths, area,
    box, and the mean probability as its score."""
    from pycocotools import mask as coco

    whole = np.zeros(logits.shape, np.uint8, order="F")
    whole[place] = part
    runs = coco.encode(whole)
    return {
        "segmentation": {"size": list(logits.shape), "counts": runs["counts"].decode()},
        "area": int(part.sum()),
        "bbox": [float(side) for side in coco.toBbox(runs)],
        "iscrowd": 0,
        "score": score(place, part, logits),
    }


def score(place: tuple[slice, ...], part: np.ndarray, logits: np.ndarray) -> float:
    """Mean probability over a part."""
    return round(float(_sigmoid(logits[place][part]).mean()), 6)


def outline(place: tuple[slice, ...], part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The outer outline (points, 2) of a part, half way between pixels inside and outside (so that its corners are
    cut), as shares of the width and height of `shape`."""
    import contourpy

    height, width = shape
    whole = np.pad(ndimage.binary_fill_holes(part), 1).astype(np.float64)
    centres = np.arange(whole.shape[1]) - 0.5 + place[1].start, np.arange(whole.shape[0]) - 0.5 + place[0].start
    lines: list[np.ndarray] = contourpy.contour_generator(*centres, whole).lines(0.5)  # type: ignore[assignment]
    longest = max(lines, key=len)
    return np.clip(longest[:-1] / (width, height), 0, 1)


def _binary(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))


def labels(found: Found) -> Image.Image:
    """A PNG whose values are classes, with their colours."""
    picture, colours = Image.fromarray(found.labels), panels.COLOURS
    every = [colours[number % len(colours)] for number in range(255)]  # all 256, or PNG would pack fewer bits
    picture.putpalette([0, 0, 0, *(value for colour in every for value in colour)])
    return picture


def _grey(logits: np.ndarray) -> Image.Image:
    grey = np.empty(logits.shape, np.uint16)
    for top in range(0, len(grey), panels.ROWS):
        grey[top : top + panels.ROWS] = (_sigmoid(logits[top : top + panels.ROWS]) * 65535).round()
    return Image.fromarray(grey)


def overlay(found: Found, names: Sequence[str]) -> Image.Image:
    """The photograph with its masks, named and scored."""
    captions = [f"{name} {score:.2f}" for name, score in zip(names, found.scores, strict=True)]
    return panels.overlaid(found.image, found.apart, captions)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
