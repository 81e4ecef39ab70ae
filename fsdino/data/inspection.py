"""What is wrong with a data set, file by file: all of it, where other commands stop at the first."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fsdino.data.dataset import Dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.protocols import HDMNET
from fsdino.errors import UserError
from fsdino.preprocess import orientation, read_image


@dataclass
class Report:
    """What a data set holds, and what is wrong with it."""

    images: dict[str, int] = field(default_factory=dict)
    """Of each split."""
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images of each split in which a class has a pixel."""
    per_fold: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images that train and test each fold under protocol hdmnet."""
    problems: list[str] = field(default_factory=list)
    """What would be refused, or would give wrong results."""
    notes: list[str] = field(default_factory=list)
    """What is unusual, and right all the same."""


def inspect(dataset: Dataset) -> Report:
    """Read every photograph and every label of both splits, the lists and the folds."""
    report, listed = Report(), {}
    for split in dataset.splits:
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
    report.notes += dataset.notes()
    if not report.problems:  # else it would only meet the same again
        _of_folds(dataset, report)
    return report


def unreadable(photographs: Mapping[str, str]) -> list[str]:
    """A line for each photograph that cannot be read; values are paths or URLs."""

    def problem(source: str) -> str | None:
        try:
            read_image(source)
        except UserError as error:
            return str(error.args[0])
        return None

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(problem, photographs.values()) if line is not None]


@dataclass
class _Found:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def _of_image(dataset: Dataset, image_id: str) -> _Found:
    """What is found on one image, and its classes."""
    found = _Found()
    size = label = None
    try:
        size = dataset.image(image_id).size
    except UserError as error:
        found.problems.append(error.args[0])
    try:
        label_source, label = dataset.label_source(image_id), dataset.summary(image_id)
    except UserError as error:
        found.problems.append(error.args[0])
    if label is None:
        return found
    if size is not None and label.size != size:
        width, height = label.size
        source = dataset.source(image_id)
        found.problems.append(
            f"{label_source}: {width}x{height}, but its photograph {source} is {size[0]}x{size[1]} "
            f"(EXIF orientation {orientation(source)}); save labels as photographs are shown"
        )
    elif (
        size is not None
        and label_source.endswith(".png")
        and orientation(label_source) == 1 != (turned := orientation(dataset.source(image_id)))
    ):
        found.notes.append(f"{label_source}: its photograph is turned by EXIF ({turned}); is the label drawn that way?")
    found.classes = [dataset.class_names[class_id - 1] for class_id in label.pixels]
    if not label.pixels:
        found.notes.append(f"{label_source}: image {image_id} shows no class at all")
    return found


def _of_folds(dataset: Dataset, report: Report) -> None:
    """Images of each fold under protocol hdmnet, and folds whose episodes cannot be drawn."""
    try:
        folds = dataset.folds
    except UserError as error:
        report.problems.append(f"{dataset.root}: {error.args[0]}")
        return
    for fold in range(len(folds)):
        counts = report.per_fold[str(fold)] = {}
        for training in (True, False):
            split = "train" if training else "val"
            if split not in dataset.splits or not (folds.base(fold) if training else folds.novel(fold)):
                continue
            images = (HDMNET.training_images if training else HDMNET.test_images)(dataset, fold)
            counts[split] = len(images)
            listed = {c for of_image in images.values() for c in of_image.listed}
            for class_id in sorted(set(folds.novel(fold)) - listed) if not training and images else ():
                name = dataset.class_names[class_id - 1]
                report.problems.append(f"{dataset.root}: class {name}: no test image shows enough of it to be listed")
            try:
                EpisodeSampler(images, shots=1, fold=fold, seed=0, training=training)
            except UserError as error:
                report.problems.append(f"{dataset.root}: {'training' if training else 'test'}: {error.args[0]}")
