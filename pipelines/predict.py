"""Masks for your own classes: photographs in, masks of the photographs' own sizes out.

    python -m pipelines.predict --support cat1.jpg --mask cat1.png --query a.jpg b.jpg --out masks
    python -m pipelines.predict --query clip.mp4 --first first.png --format video
    python -m pipelines.predict --query field.tif --class tree.class --tile 512 --format geotiff geojson
    python -m pipelines.predict \\
        --class cat cat1.jpg=cat1.png cat2.jpg=cat2.png --class dog.class --query photos/ --format labels coco

One to five supports, each with a mask (the brighter of two values is the object). `panel.png` shows the first 50
photographs, `results.jsonl` has a line for each that could be read. Runs on this machine alone, without stores;
fsdino.Predictor does the same in Python.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from feature_store.urls import is_url, redacted
from fsdino.data.photographs import list_photographs
from fsdino.errors import UserError, first_line
from fsdino.preprocess import read_image
from pipelines import checkpoints, videos
from pipelines.checks import Few, Folder, Format, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import Examples, read_classes, read_masks, read_photograph, registered

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fsdino.predictor import ClassEncoding, Predictor
    from pipelines.outputs import Found
    from pipelines.stored import StoredFeatures

MOST_PIXELS = 10**9
PANEL, PANEL_ROWS, RESULTS = "panel.png", 50, "results.jsonl"


@dataclass(frozen=True)
class Settings:
    """Segment the objects that the supports show in each query photograph."""

    query: tuple[str, ...]
    """Photographs to segment: files, folders, globs in quotes, archives, or any of these as an fsspec URL (folders
    there end in a slash); or videos, whose frames are photographs."""
    checkpoint: Place | None = None
    """Checkpoint folder of train_episodic (its `final`); none: the one that comes with the project."""
    support: tuple[str, ...] = ()
    """Support photographs of a single class."""
    mask: tuple[str, ...] = ()
    """Their masks, in the same order."""
    first: str | None = None
    """Instead of supports: the mask of the first photograph of --query, of a folder of frames or a video."""
    classes: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="class")] = ()
    """A class: its name, and PHOTOGRAPH=MASK of each support; or a file that `register` wrote. Once for each class."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    format: tuple[Format, ...] = ("mask",)
    """What to write: a black-and-white PNG of each class; one PNG whose values are classes, from 1 on; the photograph
    with its masks; film.mp4 of all of them; a 16-bit PNG of each class's probability; annotations.json as COCO has it;
    a text file with outlines as YOLO has it, and classes.txt; for GeoTIFFs labels and outlines on the ground."""
    instances: bool = False
    """In COCO's form, each connected part of a mask as an object."""
    gpu: bool = False
    """Run on the GPU."""
    batch: Few = 1
    """Photographs that go through the encoder at once."""
    tile: Annotated[int, Range(32, 10**5)] | None = None
    """Side in pixels of overlapping tiles that are looked at one by one, beside the whole photograph; for photographs
    much larger than the network's square, with small objects."""
    overlap: Annotated[float, Range(0, 0.9)] = 0.25
    """Share of a tile's side that the next one shows as well."""
    store: Place | None = None
    """Root of feature stores, in which `annotate --keep-features` of the same folder kept its photographs' features:
    for those the encoder does not run."""
    out: Folder = "outputs/masks"
    """Folder on this machine for what is written."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check classes, photographs and checkpoint, register, then segment one photograph after another.

    A photograph that cannot be read costs no other its mask; it is named at the end. What was found before a stop is
    written.
    """
    if settings.tile is not None:
        _let_large_photographs_in()
    if not settings.format:
        raise UserError("--format: expected at least one, got none")
    out = Path(settings.out)
    named = wanted_classes(settings)
    queries = listed(settings.query, out)
    wanted = named or [first_example(settings, queries[0])]
    from pipelines import outputs

    if {"geotiff", "geojson"} & set(settings.format):
        from pipelines import geo

        geo.check(queries)
    films = [query.rpartition("#")[0] for query in queries if videos.is_frame(query)]
    rate = videos.rate(films[0]) if films and "video" in settings.format else videos.FRAME_RATE
    writers = outputs.writers(settings.format, out, [one.name for one in wanted], settings.instances, rate)
    inputs = [path for one in wanted for path in (*one.supports, one.file) if path]
    inputs += [*settings.mask, *filter(None, [settings.first]), *settings.query, *queries]
    inputs += [pair.rpartition("=")[2] for _, *pairs in settings.classes for pair in pairs]
    stems = outputs.stems(queries, writers, (out / PANEL, out / RESULTS), inputs)
    checkpoint = checkpoints.chosen(settings.checkpoint)
    record = checkpoints.read_record(checkpoint, "segmenter")
    stored = None
    if settings.store is not None:
        if settings.tile is not None:
            raise UserError("--store, --tile: stores have no features of tiles; leave one of them out")
        from pipelines.stored import StoredFeatures

        stored = StoredFeatures(settings.store, settings.query, record)
        known = sum(query in stored for query in queries)
        print(f"features of {known} of {len(queries)} photographs come from {settings.store}", file=sys.stderr)

    from pipelines import panels

    predictor = checkpoints.load_predictor(checkpoint, settings.encoder_weights, settings.gpu)
    classes = [registered(one, predictor) for one in wanted]
    predictor.check(classes)
    out.mkdir(parents=True, exist_ok=True)
    first = wanted[0]
    support = panels.overlay(read_photograph(first.supports[0]), first.masks[0] == 1) if first.supports else None
    names, unread = [one.name for one in wanted], list[str]()
    masks: list[dict[str, Any]] = []
    rows: list[list[Image.Image | None]] = []
    try:
        with open(out / RESULTS, "w") as lines:
            photographs = list(zip(queries, stems, strict=True))
            for found, prior in segmented(predictor, classes, photographs, settings, unread, stored):
                for writer in writers:
                    writer.add(found)
                line = line_of(found, names, [str(path) for writer in writers for path in writer.paths(found.stem)])
                lines.write(json.dumps(line) + "\n")
                foreground = max(of["foreground"] for of in line["classes"])
                alone = str(out / f"{found.stem}.png") if "mask" in settings.format and len(names) == 1 else None
                masks.append({"query": found.query, "mask": alone, "foreground": foreground})
                if len(rows) < PANEL_ROWS:
                    heat = None if prior is None else panels.heat(prior)
                    rows.append([support, panels.cell(found.image), heat, pictured(found, names)])
    finally:
        for writer in writers:
            writer.close()
    if rows:
        panels.panel(("support", "query", "prior", "prediction"), rows).save(out / PANEL)
    for reason in unread[1:]:
        print(f"not segmented: {reason}", file=sys.stderr)
    if unread:
        raise UserError(f"{len(unread)} of {len(queries)} photographs were not segmented; the first: {unread[0]}")
    return {
        "masks": masks,
        "files": [str(path) for writer in writers for path in writer.shared],
        "results": str(out / RESULTS),
        "panel": str(out / PANEL),
        "shots": max(c.shots for c in classes),
    }


def _let_large_photographs_in() -> None:
    """Pillow refuses more than 178 megapixels, as a file of a few kB could fill the memory with them."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # it warns from here on, and refuses from twice as many


def line_of(found: "Found", names: Sequence[str], files: list[str]) -> dict[str, Any]:
    """What results.jsonl says of a photograph."""
    shares = [round(float(mask.mean()), 4) for mask in found.masks]
    scores = [round(float(score), 4) for score in found.scores]
    return {
        "query": redacted(found.query),
        "width": found.image.width,
        "height": found.image.height,
        "files": files,
        "classes": [
            {"name": name, "score": score, "foreground": share}
            for name, score, share in zip(names, scores, shares, strict=True)
        ],
    }


def pictured(found: "Found", names: Sequence[str]) -> "Image.Image":
    """The photograph with what was found, as a cell."""
    from pipelines import panels

    if len(names) == 1:
        return panels.overlay(found.image, found.masks[0])
    return panels.cell(panels.overlaid(found.image, found.apart, names))


def wanted_classes(settings: Settings) -> list[Examples]:
    """The classes that the flags name, their masks read; none with `--first`. Raises UserError for what is none."""
    if settings.first is not None:
        if settings.classes or settings.support or settings.mask:
            raise UserError("--first: is the only example; leave --class, --support and --mask out")
        return []
    if not settings.classes:
        return [Examples("object", settings.support, read_masks(settings.support, settings.mask, settings.mask_value))]
    if settings.support or settings.mask:
        raise UserError("--class: names its own supports; leave --support and --mask out")
    return read_classes(settings.classes, settings.mask_value)


def first_example(settings: Settings, query: str) -> Examples:
    """The first photograph with its mask. Raises UserError if that is none of it."""
    return Examples("object", (query,), read_masks([query], [str(settings.first)], settings.mask_value))


def listed(queries: Sequence[str], out: Path) -> list[str]:
    """Photographs of files, folders and globs, without what lies in `out`. Raises UserError for one that is not
    there."""
    if not queries:
        raise UserError("--query: expected at least one photograph, got none")
    found: list[str] = []
    for query in queries:
        if not query:
            raise UserError("--query: expected a photograph, got an empty name")
        if any(sign in query for sign in "*?[") or Path(query).is_dir() or query.endswith(("/", ".tar")):
            inside = sorted(list_photographs(query, flag="--query").values(), key=natural)
            others = [path for path in inside if is_url(path) or out.resolve() not in Path(path).resolve().parents]
            if left := len(inside) - len(others):
                print(f"note: {left} pictures below --out {out} are left out", file=sys.stderr)
            found += others
            continue
        if not is_url(query) and not Path(query).exists():
            read_image(query)  # says so
        found.append(query)
    found = [name for path in found for name in (videos.frames(path) if videos.is_video(path) else [path])]
    if not found:
        raise UserError(f"--query {queries[0]}: expected photographs beside those in --out {out}, found none")
    return found


def natural(path: str) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def segmented(
    predictor: "Predictor",
    classes: "Sequence[ClassEncoding]",
    queries: Sequence[tuple[str, str]],
    settings: Settings,
    unread: list[str],
    stored: "StoredFeatures | None",
) -> "Iterator[tuple[Found, np.ndarray | None]]":
    """What each photograph shows, and the first class's prior; reasons why others cannot be read go to `unread`."""
    from pipelines.outputs import Found

    batch = settings.batch if settings.tile is None else 1
    for at in range(0, len(queries), batch):
        opened = []
        for path, stem in queries[at : at + batch]:
            try:
                opened.append((path, stem, read_photograph(path)))
            except (UserError, OSError) as error:
                unread.append(first_line(error))
        if not opened:
            continue
        for known, part in groupby(opened, key=lambda one: stored is not None and one[0] in stored):
            group = list(part)
            if known and stored is not None:
                features = stored.read([path for path, _, _ in group], predictor.device)
                predictor.set_features([image.size for _, _, image in group], *features)
            elif settings.tile is None:
                predictor.set_images([image for _, _, image in group])
            else:
                predictor.set_image(group[0][2], settings.tile, settings.overlap)
            for (path, stem, image), of_image in zip(group, predictor.logits(classes), strict=True):
                found = Found(path, stem, image, of_image.mask.numpy(), of_image.scores, of_image.lag)
                yield found, None if of_image.prior is None else of_image.prior[0].sigmoid().numpy()


if __name__ == "__main__":
    main(Settings, job)
