"""Masks for your own classes: photographs in, masks of the photographs' own sizes out.

    python -m pipelines.predict --checkpoint CHECKPOINT \\
        --support cat1.jpg --mask cat1.png --query a.jpg b.jpg --out masks
    python -m pipelines.predict --checkpoint CHECKPOINT \\
        --class cat cat1.jpg=cat1.png cat2.jpg=cat2.png --class dog.class --query photos/ --format labels coco

One to five supports, each with a mask (the brighter of two values is the object). `panel.png` shows the first 50
photographs, `results.jsonl` has a line for each. Runs on this machine alone, without stores; fsdino.Predictor does the
same in Python.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from feature_store.urls import is_url
from fsdino.data.photographs import list_photographs
from fsdino.errors import UserError, first_line
from fsdino.preprocess import read_image
from pipelines import checkpoints
from pipelines.checks import Few, Folder, Place, Range, Weights
from pipelines.cli import main
from pipelines.register import read_masks

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fsdino.predictor import ClassEncoding, Predictor

PANEL, PANEL_ROWS, RESULTS = "panel.png", 50, "results.jsonl"


@dataclass(frozen=True)
class Settings:
    """Segment the objects that the supports show in each query photograph."""

    checkpoint: Place
    """Checkpoint folder of train_episodic (its `final`)."""
    query: tuple[str, ...]
    """Photographs to segment: files, folders, globs in quotes, archives, or any of these as an fsspec URL."""
    support: tuple[str, ...] = ()
    """Support photographs of a single class."""
    mask: tuple[str, ...] = ()
    """Their masks, in the same order."""
    classes: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="class")] = ()
    """A class: its name, and PHOTOGRAPH=MASK of each support; or a file that `register` wrote. Once for each class."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    format: tuple[Literal["mask", "labels", "overlay", "probability", "coco", "yolo"], ...] = ("mask",)
    """What to write: a black-and-white PNG of each class; one PNG whose values are classes, from 1 on; the photograph
    with its masks; a 16-bit PNG of each class's probability; annotations.json as COCO has it; a text file with outlines
    as YOLO has it, and classes.txt."""
    instances: bool = False
    """In COCO's form, each connected part of a mask as an object."""
    gpu: bool = False
    """Run on the GPU."""
    batch: Few = 1
    """Photographs that go through the encoder at once."""
    out: Folder = "outputs/masks"
    """Folder on this machine for what is written."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


class Examples(NamedTuple):
    """A class that is to be registered, or a file of one that is."""

    name: str
    supports: tuple[str, ...]
    masks: "list[np.ndarray]"
    file: str = ""


def job(settings: Settings) -> dict[str, Any]:
    """Check classes, photographs and checkpoint, register, then segment one photograph after another.

    A photograph that cannot be read costs no other its mask; it is named at the end.
    """
    wanted = examples(settings)
    queries = listed(settings.query)
    inputs = [path for one in wanted for path in (*one.supports, one.file) if path]
    stems = stems_of(queries, Path(settings.out), (*inputs, *masks_of(settings), *queries))
    checkpoints.read_record(settings.checkpoint, "segmenter")

    from pipelines import outputs, panels

    predictor = checkpoints.load_predictor(settings.checkpoint, settings.encoder_weights, settings.gpu)
    classes = [registered(one, predictor) for one in wanted]
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    writers = outputs.writers(settings.format, out, [c.name for c in classes], settings.instances)
    shown = [panels.overlay(read_image(one.supports[0]), one.masks[0] == 1) if one.supports else None for one in wanted]
    unread: list[str] = []
    masks: list[dict[str, Any]] = []
    rows: list[list[Image.Image | None]] = []
    with open(out / RESULTS, "w") as lines:
        for found, prior in segmented(
            predictor, classes, list(zip(queries, stems, strict=True)), settings.batch, unread
        ):
            files = [str(path) for writer in writers for path in writer.add(found)]
            shares = [round(float(mask.mean()), 4) for mask in found.masks]
            scores = [round(float(score), 4) for score in found.scores]
            line = {"query": found.query, "width": found.image.width, "height": found.image.height, "files": files}
            of_classes = [
                {"name": c.name, "score": score, "foreground": share}
                for c, score, share in zip(classes, scores, shares, strict=True)
            ]
            lines.write(json.dumps({**line, "classes": of_classes}) + "\n")
            masks.append({"query": found.query, "mask": files[0] if files else None, "foreground": max(shares)})
            if len(rows) < PANEL_ROWS:
                heat = None if prior is None else panels.heat(prior)
                picture = panels.overlay(found.image, found.masks[0])
                if len(classes) > 1:
                    picture = panels.cell(panels.overlaid(found.image, found.apart, [c.name for c in classes]))
                rows.append([shown[0], panels.cell(found.image), heat, picture])
    closed = [str(path) for writer in writers for path in writer.close()]
    picture_file = out / PANEL
    if rows:
        panels.panel(("support", "query", "prior", "prediction"), rows).save(picture_file)
    if unread:
        raise UserError(f"{len(unread)} of {len(queries)} photographs were not segmented; the first: {unread[0]}")
    return {
        "masks": masks,
        "files": closed,
        "results": str(out / RESULTS),
        "panel": str(picture_file),
        "shots": max(c.shots for c in classes),
    }


def examples(settings: Settings) -> list[Examples]:
    """The classes that the flags name, their masks read. Raises UserError for what is none."""
    if not settings.classes:
        return [Examples("object", settings.support, read_masks(settings.support, settings.mask, settings.mask_value))]
    if settings.support or settings.mask:
        raise UserError("--class: names its own supports; leave --support and --mask out")
    found = []
    for name, *pairs in settings.classes:
        if not pairs:
            if not Path(name).is_file():
                raise UserError(f"--class {name}: expected PHOTOGRAPH=MASK behind the name, or a class file")
            found.append(Examples("", (), [], name))
            continue
        split = [pair.rpartition("=") for pair in pairs]
        for pair, (photograph, _, mask) in zip(pairs, split, strict=True):
            if not photograph or not mask:
                raise UserError(f"--class {name} {pair}: expected PHOTOGRAPH=MASK")
        supports, masks = tuple(photograph for photograph, _, _ in split), [mask for _, _, mask in split]
        found.append(Examples(name, supports, read_masks(supports, masks, settings.mask_value)))
    return found


def masks_of(settings: Settings) -> list[str]:
    """Files of masks, which nothing may overwrite."""
    return [*settings.mask, *(pair.rpartition("=")[2] for _, *pairs in settings.classes for pair in pairs)]


def listed(queries: Sequence[str]) -> list[str]:
    """Photographs of files, folders and globs. Raises UserError for one that is not there."""
    if not queries:
        raise UserError("--query: expected at least one photograph, got none")
    found: list[str] = []
    for query in queries:
        if any(sign in query for sign in "*?[") or Path(query).is_dir() or query.endswith(("/", ".tar")):
            found += list_photographs(query, flag="--query").values()
            continue
        if not is_url(query) and not Path(query).exists():
            read_image(query)  # says so
        found.append(query)
    return found


def registered(one: Examples, predictor: "Predictor") -> "ClassEncoding":
    """A class for the predictor: from its file, or from its examples."""
    from fsdino.predictor import ClassEncoding

    return ClassEncoding.load(one.file) if one.file else predictor.register(one.supports, one.masks, one.name)


def segmented(
    predictor: "Predictor",
    classes: "Sequence[ClassEncoding]",
    queries: Sequence[tuple[str, str]],
    batch: int,
    unread: list[str],
) -> "Iterator[tuple[Any, np.ndarray | None]]":
    """What each photograph shows, and the first class's prior; reasons why others cannot be read go to `unread`."""
    from pipelines.outputs import Found

    for at in range(0, len(queries), batch):
        opened = []
        for path, stem in queries[at : at + batch]:
            try:
                opened.append((path, stem, read_image(path)))
            except (UserError, OSError) as error:
                unread.append(first_line(error))
        if not opened:
            continue
        predictor.set_images([image for _, _, image in opened])
        for (path, stem, image), (logits, prior) in zip(opened, predictor.logits(classes), strict=True):
            scores = predictor.scores(logits)
            yield (
                Found(path, stem, image, logits.numpy(), scores),
                None if prior is None else prior[0].sigmoid().numpy(),
            )


def stems_of(queries: Sequence[str], out: Path, inputs: Sequence[str]) -> list[str]:
    """What the files of each photograph are called, numbered where a name is taken. Raises UserError if a mask would
    replace an input."""
    taken = {Path(PANEL).stem}
    given = {Path(path).resolve() for path in inputs if not is_url(path)}
    stems = []
    for query in queries:
        stem = Path(query).stem
        numbered = (f"{stem}{suffix}" for suffix in chain([""], (f"-{n}" for n in count(2))))
        chosen = next(s for s in numbered if s not in taken)
        path = out / f"{chosen}.png"
        if path.resolve() in given:
            raise UserError(f"--out {out}: the mask of {query} would overwrite the input {path}; choose another folder")
        taken.add(chosen)
        stems.append(chosen)
    return stems


if __name__ == "__main__":
    main(Settings, job)
