"""Lists of images with the one class that each is for, as HSNet and those after it publish them.

A folder holds trn/ and val/ with fold0.txt, fold1.txt, ... whose lines are IMAGE__CLASS (classes from 1), or fold0.pkl,
..., each a dictionary from class (from 0) to images. Text lists hold the fold's novel classes, in trn/ as in val/, so
that the other folds' lists train a fold; pickled ones in trn/ hold the classes that train it.
"""

import io
import pickle
import re
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from fsdino.data.dataset import Dataset
from fsdino.data.protocols import ImageClasses
from fsdino.errors import DataError, first_line, reachable

Pair = tuple[str, int]


def read_pairs(folder: str, dataset: Dataset, fold: int, training: bool) -> list[Pair]:
    """Images and classes that train or test a fold, in the lists' order.

    Raises DataError, with the line, for what is not such a list, for an image that the data set does not list, or a
    class that the fold does not have.
    """
    split = UPath(folder) / ("trn" if training else "val")
    with reachable(split):
        pickled = (split / f"fold{fold}.pkl").exists()
        if pickled:
            pairs = _pickled(split / f"fold{fold}.pkl")
        else:
            numbers = [f for f in range(len(dataset.folds)) if f != fold] if training else [fold]
            pairs = [pair for number in numbers for pair in _lines(split / f"fold{number}.txt")]
    known = set(dataset.ids("train" if training else "val"))
    classes = set(dataset.folds.base(fold) if training else dataset.novel(fold))
    for place, image_id, class_id in pairs:
        if image_id not in known:
            raise DataError(f"{place}: expected an image of the data set, got {image_id}; add it to the list of images")
        if class_id not in classes:
            raise DataError(f"{place}: class {class_id} is none of fold {fold}'s: {sorted(classes)}")
    return [(image_id, class_id) for _, image_id, class_id in pairs]


def of_pairs(pairs: list[Pair]) -> dict[str, ImageClasses]:
    """The images of a list, each with its classes."""
    classes: dict[str, set[int]] = {}
    for image_id, class_id in pairs:
        classes.setdefault(image_id, set()).add(class_id)
    return {image_id: ImageClasses(tuple(sorted(c)), tuple(sorted(c))) for image_id, c in classes.items()}


def _lines(path: UPath) -> list[tuple[str, str, int]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise DataError(f"{path}: expected a list of images and classes, found none; see --pairs") from None
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            match = re.fullmatch(r"(\S+)__(\d+)", line.strip())
            if match is None:
                raise DataError(f"{path}: line {number}: expected IMAGE__CLASS, got {line!r}")
            found.append((f"{path}: line {number}", match[1], int(match[2])))
    return found


class _Plain(pickle.Unpickler):
    """Dictionaries, lists, strings and numbers alone: any other pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would load {module}.{name}")


def _pickled(path: UPath) -> list[tuple[str, str, int]]:
    try:
        content = _Plain(io.BytesIO(path.read_bytes())).load()
        classes = sorted((int(c), [str(name) for name in names]) for c, names in content.items())
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise DataError(f"{path}: expected a dictionary from class to images, got: {first_line(error)}") from None
    return [(str(path), PurePosixPath(name).stem, c + 1) for c, names in classes for name in names]
