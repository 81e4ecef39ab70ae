"""What a recipe costs on a data set, before anything starts: images, bytes of each store, hours.

    python -m pipelines.plan --recipe paper --data VOCdevkit/VOC2012
    python -m pipelines.plan --recipe paper --of coco2014                     # by its published numbers of images
    python -m pipelines.plan --recipe paper --of sa1b --share 0.01 --teacher-rate 12

Counts the images of the data set, or takes the published numbers of one that is not here. Hours follow from rates that
you give; docs/benchmarks has measured ones.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from feature_store.packing import sample_bytes
from fsdino.config import SegmenterConfig
from fsdino.specs import encoder_spec, teacher_spec
from pipelines import datasets
from pipelines.checks import Range
from pipelines.cli import main
from pipelines.recipes import (
    Backbone,
    Benchmark,
    Distillation,
    Episodic,
    Extraction,
    Photographs,
    Places,
    RecipeName,
    Teaching,
)

PUBLISHED = {
    "voc": (5953, 1449),
    "coco2014": (82783, 40504),
    "coco2017": (118287, 5000),
    "fss1000": (5200, 2400),
    "davis2017": (4219, 2023),
    "sa1b": (11185362, 0),
}
"""Images of train and test. FSS-1000: 520 and 240 classes of ten; DAVIS-17: frames of 60 and 30 videos."""
Rate = Annotated[float, Range(0, 1e6, closed=False)]


@dataclass(frozen=True)
class Settings:
    """Print what a recipe costs."""

    recipe: RecipeName
    places: Places
    photographs: Photographs
    backbone: Backbone
    teaching: Teaching
    extraction: Extraction
    distillation: Distillation
    model: SegmenterConfig
    benchmark: Benchmark
    episodic: Episodic
    of: Literal["voc", "coco2014", "coco2017", "fss1000", "davis2017", "sa1b"] | None = None
    """A data set by its published numbers of images, instead of the one at --data."""
    encoder_rate: Rate | None = None
    """Images per second that all actors encode."""
    teacher_rate: Rate | None = None
    """Images per second that all actors run through the teacher."""
    distill_rate: Rate | None = None
    """Steps of distillation per second."""
    train_rate: Rate | None = None
    """Steps of episodic training per second."""


def job(settings: Settings) -> dict[str, Any]:
    """Count, multiply, print a table before the JSON line."""
    images = counted(settings)
    lines, hours = stores_of(settings, images), hours_of(settings, images)
    total = sum(line["bytes"] for line in lines)
    many = f"{images.train} training and {images.test} test images, {images.distilled} for distillation"
    print(f"{images.name}, recipe {settings.recipe}: {many}\n")
    print("| store | samples | each | together |\n|---|---|---|---|")
    for line in lines:
        each, together = line["bytes"] / max(line["samples"], 1) / 1e3, line["bytes"] / 1e9
        print(f"| {line['store']} | {line['samples']} | {each:.0f} kB | {together:.2f} GB |")
    print(f"| all |  |  | {total / 1e9:.2f} GB |\n")
    for what, (amount, unit, rate, time) in hours.items():
        told = f"{time:.1f} h at {rate:g}/s" if time is not None else "give its rate for the hours"
        print(f"{what}: {amount} {unit}, {told}")
    return {
        "dataset": images.name,
        "train_images": images.train,
        "test_images": images.test,
        "distillation_images": images.distilled,
        "stores": lines,
        "bytes": total,
        "hours": {what: time for what, (_, _, _, time) in hours.items()},
    }


@dataclass(frozen=True)
class Counts:
    """Images of a data set, and of distillation."""

    name: str
    train: int
    test: int
    distilled: int
    elsewhere: bool
    """Whether distillation has images of its own."""


def counted(settings: Settings) -> Counts:
    """Images that train, test, and teach."""
    photographs = settings.photographs
    if settings.of == "sa1b":
        return Counts("sa1b", 0, 0, max(1, round(photographs.share * PUBLISHED["sa1b"][0])), True)
    name = str(settings.of)
    if settings.of is not None:
        train, test = PUBLISHED[settings.of]
    else:
        dataset = datasets.dataset_of(settings.places)
        name = dataset.name
        train, test = (len(dataset.ids(split)) if split in dataset.splits else 0 for split in ("train", "val"))
    if photographs.images is None:
        return Counts(name, train, test, train if settings.model.adapter == "distilled" else 0, False)
    return Counts(name, train, test, len(datasets.listed(photographs, settings.places.skip_bad)), True)


def stores_of(settings: Settings, images: Counts) -> list[dict[str, Any]]:
    """Name, samples and bytes of each store."""
    backbone, dtype = settings.backbone, settings.extraction.dtype
    encoder = encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm)
    teacher = teacher_spec(settings.teaching.teacher)
    own, taught = images.train * backbone.num_views + images.test, images.distilled

    def early(res: int, count: int) -> tuple[str, int, int, int, int]:
        return "early", res, count, encoder.grid(res), encoder.early.channels

    wanted = [early(backbone.res, own)]
    wanted.append(("late", backbone.res, own, encoder.grid(backbone.res), encoder.late.channels))
    if settings.model.adapter != "joint":
        wanted.append(("embedding", backbone.res, own, encoder.grid(backbone.res), teacher.layer.channels))
    own_res = [] if images.elsewhere else [backbone.res]
    wanted += [early(res, taught) for res in settings.distillation.distill_res if res not in own_res]
    side = teacher.input_px(backbone.res)
    wanted.append(("teacher", side, taught, teacher.grid(backbone.res), teacher.layer.channels))
    return [
        {"store": f"{feature}@{res}", "samples": count, "bytes": count * sample_bytes(grid, channels, dtype)}
        for feature, res, count, grid, channels in wanted
        if count
    ]


Cost = tuple[int, str, float | None, float | None]


def hours_of(settings: Settings, images: Counts) -> dict[str, Cost]:
    """Each step's amount, unit, rate and hours."""
    backbone, distillation, episodic = settings.backbone, settings.distillation, settings.episodic
    per_epoch = int((1 - distillation.validation_share) * images.distilled) // distillation.distill_batch
    steps = len(distillation.distill_res) * distillation.distill_epochs * per_epoch
    further = len(distillation.distill_res) - (0 if images.elsewhere else 1)
    forwards = images.train * backbone.num_views + images.test + images.distilled * further
    trained = episodic.steps or episodic.epochs * images.train // episodic.batch
    costs: dict[str, tuple[int, str, float | None]] = {
        "encoder": (forwards, "images", settings.encoder_rate),
        "teacher": (images.distilled, "images", settings.teacher_rate),
        "distillation": (steps, "steps", settings.distill_rate),
        "training, each fold and model (at most)": (trained if images.train else 0, "steps", settings.train_rate),
    }
    return {
        what: (amount, unit, rate, None if rate is None else round(amount / rate / 3600, 2))
        for what, (amount, unit, rate) in costs.items()
        if amount
    }


if __name__ == "__main__":
    main(Settings, job)
