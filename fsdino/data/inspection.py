"""What is wrong with a data set, file by file: all of it, where other commands stop at the first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fsdino import paper
from fsdino.data.dataset import Dataset, Split
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.protocols import HDMNET
from fsdino.errors import UserError
from fsdino.preprocess import orientation

SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass
class Report:
    """What a data set holds, and what is wrong with it."""

    images: dict[str, int] = field(default_factory=dict)
    """Of each split."""
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images of each split in which a class has a pixel."""
    problems: list[str] = field(default_factory=list)
    """What would be refused, or would give wrong results."""
    notes: list[str] = field(default_factory=list)
    """What is unusual, and right all the same."""


def inspect(dataset: Dataset) -> Report:
    """Read every photograph and every label of both splits, the lists and the folds."""
    report, listed = Report(), {}
    for split in SPLITS:
        try:
            listed[split] = dataset.ids(split)
        except UserError as error:
            report.problems.append(error.args[0])
            continue
        report.images[split] = len(listed[split])
        counts = report.per_class[split] = dict.fromkeys(dataset.class_names, 0)
        with ThreadPoolExecutor() as pool:
            for found in pool.map(lambda image_id: _of_image(dataset, image_id), listed[split]):
                report.problems += found.problems
                report.notes += found.notes
                for name in found.classes:
                    counts[name] += 1
    both = sorted(set(listed.get("train", ())) & set(listed.get("val", ())))
    if both:
        report.problems.append(
            f"{dataset.root}: {len(both)} images are in both lists (the first: {both[0]}); take them out of one"
        )
    if not report.problems:  # else it would only meet the same again
        report.problems += _of_folds(dataset)
    return report


@dataclass
class _Found:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def _of_image(dataset: Dataset, image_id: str) -> _Found:
    """What is found on one image, and its classes."""
    found, label_source, known = _Found(), dataset.label_source(image_id), len(dataset.class_names)
    size = label = None
    try:
        size = dataset.image(image_id).size
    except UserError as error:
        found.problems.append(error.args[0])
    try:
        label = dataset.label(image_id)
    except UserError as error:
        found.problems.append(error.args[0])
    if label is None:
        return found
    if size is not None and label.shape != size[::-1]:
        height, width = label.shape
        source = dataset.source(image_id)
        found.problems.append(
            f"{label_source}: {width}x{height}, but its photograph {source} is {size[0]}x{size[1]} "
            f"(EXIF orientation {orientation(source)}); save labels as photographs are shown"
        )
    elif size is not None and (turned := orientation(dataset.source(image_id))) != 1 and orientation(label_source) == 1:
        found.notes.append(f"{label_source}: its photograph is turned by EXIF ({turned}); is the label drawn that way?")
    values = [int(v) for v in np.unique(label) if v not in (0, paper.VOID)]
    beyond = [v for v in values if v > known]
    if beyond:
        found.problems.append(
            f"{label_source}: class {', '.join(map(str, beyond[:8]))}, but the data set has {known}; correct the "
            "label, or name all classes in classes.txt"
        )
    found.classes = [dataset.class_names[v - 1] for v in values if v <= known]
    if not values:
        found.notes.append(f"{label_source}: no class at all")
    return found


def _of_folds(dataset: Dataset) -> Iterator[str]:
    """Folds whose episodes cannot be drawn under protocol hdmnet."""
    for fold in range(dataset.num_folds):
        try:
            dataset.novel(fold)
        except UserError as error:
            yield f"{dataset.root}: {error.args[0]}"
            return
        for training in (True, False):
            images = (HDMNET.training_images if training else HDMNET.test_images)(dataset, fold)
            listed = {c for of_image in images.values() for c in of_image.listed}
            for class_id in () if training or not images else set(dataset.novel(fold)) - listed:
                yield f"{dataset.root}: class {dataset.class_names[class_id - 1]}: no image of the test list shows it"
            try:
                EpisodeSampler(images, shots=1, fold=fold, seed=0, training=training)
            except UserError as error:
                yield f"{dataset.root}: {'training' if training else 'test'}: {error.args[0]}"
