"""Instance annotations in COCO's JSON format, as maps of class numbers.

The JSON is read once: objects become run lengths in a file of the cache, so that a process that opens COCO's 118,000
images needs neither 10 s nor gigabytes. Class numbers are the categories' ranks by id, from 1.

Where objects overlap the later one of the JSON is seen, as in the class maps that the field shares. Crowd regions are
void (in those maps they are background), seen where no object is. Polygons of fewer than three points are skipped and
counted.
"""

import functools
import hashlib
import json
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as rle
from upath import UPath

from fsdino import paper
from fsdino.data.lists import MOST_CLASSES
from fsdino.errors import DataError, reachable
from fsdino.weights import cache_folder

FORMAT = "2"
FARTHEST = 1e6  # a coordinate that is no pixel's
MOST_SIDE = 65535  # pixels


@dataclass(frozen=True)
class Instances:
    """The objects of a set of images. Those of image i are `objects[first[i] : first[i + 1]]`, in painting order."""

    class_names: list[str]
    names: list[str]
    """File name of each image, as the JSON has it."""
    sizes: np.ndarray
    """(images, 2): height, width."""
    first: np.ndarray
    classes: np.ndarray
    """Class number of each object, 255 for a crowd region."""
    runs: np.ndarray
    """Run lengths of all objects, in COCO's compressed form, one behind the other."""
    ends: np.ndarray
    """Where the run lengths of each object end."""
    skipped_polygons: int

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """File name to image."""
        return {name: number for number, name in enumerate(self.names)}

    def label(self, number: int) -> UInt8[np.ndarray, "h w"]:
        """Class numbers of an image, 255 where only a crowd is."""
        height, width = (int(side) for side in self.sizes[number])
        label = np.zeros((height, width), np.uint8)
        for position in range(int(self.first[number]), int(self.first[number + 1])):
            begin = int(self.ends[position - 1]) if position else 0
            counts = self.runs[begin : int(self.ends[position])].tobytes()
            label[rle.decode({"size": [height, width], "counts": counts}) > 0] = self.classes[position]
        return label

    def notes(self, place: str) -> list[str]:
        """What is unusual about the file at a place."""
        count = self.skipped_polygons
        return [f"{place}: {count} polygons of fewer than three points are skipped"] if count else []


def read_instances(path: UPath) -> Instances:
    """The annotations of a JSON file. Raises DataError, naming the annotation, for what is not COCO's format."""
    with reachable(path):
        stat = path.stat()
    described = f"{FORMAT} {path.absolute()} {stat.st_size} {stat.st_mtime}"
    cached = cache_folder() / f"instances-{hashlib.sha256(described.encode()).hexdigest()[:16]}.npz"
    if not cached.exists():
        with reachable(path):
            data = path.read_bytes()
        found = _parse(str(path), data)
        partial = cached.with_suffix(f".{uuid.uuid4().hex}.npz")
        np.savez(partial, **{**vars(found), "class_names": found.class_names, "names": found.names})
        partial.rename(cached)
        return found
    try:
        with np.load(cached) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError):  # a disk that was full: once more from the JSON
        cached.unlink()
        return read_instances(path)
    lists = {key: arrays[key].tolist() for key in ("class_names", "names", "skipped_polygons")}
    return Instances(**{**arrays, **lists})


def _parse(place: str, data: bytes) -> Instances:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected COCO's JSON, got: {error}; download it again") from None
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(_get(content, key), list)]
    if missing:
        raise DataError(f"{place}: expected COCO's JSON with lists of {', '.join(missing)}, found none")
    categories = sorted((_int(place, "categories", c, "id"), str(c.get("name", ""))) for c in content["categories"])
    if not 1 <= len(categories) <= MOST_CLASSES:
        raise DataError(f"{place}: expected 1 to {MOST_CLASSES} categories, as 255 is void, got {len(categories)}")
    names = [name for _, name in categories]
    if len({number for number, _ in categories}) < len(categories) or len(set(names)) < len(names) or not all(names):
        raise DataError(f"{place}: expected categories with ids and names of their own, got {str(categories)[:120]}")
    class_of = {number: position for position, (number, _) in enumerate(categories, start=1)}
    images = {}
    for record in content["images"]:
        size = (_int(place, "images", record, "height"), _int(place, "images", record, "width"))
        number, name = _int(place, "images", record, "id"), str(record.get("file_name", ""))
        if not all(0 < side <= MOST_SIDE for side in size) or not name or "\0" in name:
            raise DataError(f"{place}: image {number}: expected a file name and a size in pixels, got {name!r}, {size}")
        images[number] = (name, size)
    if len(images) < len(content["images"]) or len({_stem(name) for name, _ in images.values()}) < len(images):
        raise DataError(f"{place}: expected each image once, got an id, or a file name without its suffix, twice")
    objects: dict[int, list[tuple[int, bytes]]] = {number: [] for number in images}
    crowds: dict[int, list[tuple[int, bytes]]] = {number: [] for number in images}
    skipped = 0
    for position, record in enumerate(content["annotations"]):
        of = f"annotation {record.get('id', f'at position {position}')}" if isinstance(record, dict) else "annotations"
        image, category = (_int(place, of, record, key) for key in ("image_id", "category_id"))
        if image not in images:
            raise DataError(f"{place}: {of}: expected an image of the file, got image_id {image}")
        if category not in class_of:
            raise DataError(f"{place}: {of}: expected a category of the file, got category_id {category}")
        size, crowd = images[image][1], record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{place}: {of}: expected iscrowd 0 or 1, got {crowd!r}")
        segmentation = record.get("segmentation")
        if isinstance(segmentation, list):
            whole = [polygon for polygon in segmentation if _is_polygon(place, of, polygon)]
            skipped += len(segmentation) - len(whole)
            parts = rle.frPyObjects(whole, *size) if whole else []
        else:
            parts = [_checked_runs(place, of, segmentation, size)]
        if parts:
            entry = (paper.VOID if crowd else class_of[category], rle.merge(parts)["counts"])
            (crowds if crowd else objects)[image].append(entry)
    painted = {image: [*crowds[image], *objects[image]] for image in images}
    flat = [entry for of_image in painted.values() for entry in of_image]
    return Instances(
        class_names=[name for _, name in categories],
        names=[name for name, _ in images.values()],
        sizes=np.array([size for _, size in images.values()], np.int32).reshape(-1, 2),
        first=np.cumsum([0, *(len(of_image) for of_image in painted.values())]),
        classes=np.array([number for number, _ in flat], np.uint8),
        runs=np.frombuffer(b"".join(counts for _, counts in flat), np.uint8),
        ends=np.cumsum([len(counts) for _, counts in flat], dtype=np.int64),
        skipped_polygons=skipped,
    )


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _int(place: str, of: str, record: Any, key: str) -> int:
    value = _get(record, key)
    if not isinstance(value, int):
        raise DataError(f"{place}: {of}: expected a whole number {key}, got {value!r}")
    return value


def _is_polygon(place: str, of: str, polygon: Any) -> bool:
    """Whether a list of coordinates has three points. Raises DataError if it is none."""
    numbers = isinstance(polygon, list) and all(isinstance(x, (int, float)) for x in polygon)
    if not numbers or len(polygon) % 2 or not all(-FARTHEST < x < FARTHEST for x in polygon):  # nan is not
        raise DataError(f"{place}: {of}: expected polygons as lists of x, y, x, y, ..., got {str(polygon)[:60]}")
    return len(polygon) >= 6


def _checked_runs(place: str, of: str, segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths, as a list or compressed, in pycocotools' form. Raises DataError if they are not the image's."""
    counts = _get(segmentation, "counts")
    if not isinstance(counts, list) and not (isinstance(counts, str) and counts.isascii()):
        raise DataError(f"{place}: {of}: expected polygons or run lengths, got {str(segmentation)[:60]}")
    if segmentation.get("size") != list(size):
        raise DataError(
            f"{place}: {of}: expected run lengths of the image's size {list(size)} (height, width), got "
            f"{segmentation.get('size')}"
        )
    lengths = counts if isinstance(counts, list) else list(_run_lengths(counts))
    if not all(isinstance(n, int) and n >= 0 for n in lengths) or sum(lengths) != size[0] * size[1]:
        raise DataError(f"{place}: {of}: expected run lengths that fill {size[0]}x{size[1]} pixels, got others")
    if isinstance(counts, list):
        return rle.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": counts.encode()}


def _run_lengths(counts: str) -> Iterator[int]:
    """Of COCO's compressed form: five bits a character from the lowest up, 32 where more follow; from the fourth number
    on differences to the one before the last."""
    known: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        known.append(value + known[-2] if len(known) > 2 else value)
        yield known[-1]
        value = shift = 0
    if shift:
        yield -1
