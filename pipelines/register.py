"""A class of your own as one file: photographs in which it is marked in, what a segmenter makes of them out.

    python -m pipelines.register --name cat --support cat1.jpg cat2.jpg --mask cat1.png cat2.png --out cat.class
    python -m pipelines.register --name cat --support cat1.jpg --point 250,130 --other 20,20 --out cat.class
    python -m pipelines.register --name cat --support a.jpg b.jpg --box 120,40,300,260 2:10,10,90,80 --out cat.class

`python -m pipelines.predict --class cat.class` finds it in photographs. A class file belongs to its checkpoint. Points,
boxes and scribbles become masks by the model's own similarity: they are written beside the class file, drawn into
`cat.class.jpg`, and the class is only registered if you agree (or with `--yes`). Of several photographs `--rank` says
which help and which harm.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fsdino.errors import UserError
from fsdino.preprocess import SUFFIXES
from pipelines import checkpoints
from pipelines.checks import NewFile, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import read_masks, read_photograph

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fsdino.marks import Marks
    from fsdino.predictor import Predictor


@dataclass(frozen=True)
class Settings:
    """Write a class file."""

    name: str
    """What the class is called."""
    support: tuple[str, ...]
    """Photographs that show it."""
    out: Annotated[str, NewFile()]
    """The class file, on this machine."""
    mask: tuple[str, ...] = ()
    """Their masks, in the same order."""
    point: tuple[str, ...] = ()
    """Instead of a mask: X,Y in pixels on the object, of the second photograph 2:X,Y."""
    other: tuple[str, ...] = ()
    """X,Y in pixels beside the object, of the second photograph 2:X,Y."""
    box: tuple[str, ...] = ()
    """Instead of a mask: LEFT,TOP,RIGHT,BOTTOM in pixels around the object, of the second photograph 2:LEFT,..."""
    scribble: tuple[str, ...] = ()
    """Instead of a mask: a picture of the photograph's size with strokes of value 1 over the object and 2 beside it;
    one for each photograph."""
    yes: bool = False
    """Register what marks have become without asking."""
    checkpoint: Place | None = None
    """Checkpoint folder of train_episodic (its `final`); none: the one that comes with the project."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    rank: bool = False
    """Also say how well each photograph is found by the others, and whether it helps or harms them."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check the examples, encode them, write the file."""
    if not settings.name.strip():
        raise UserError("--name: expected what the class is called, got nothing")
    if settings.rank and len(settings.support) < 2:
        raise UserError(f"--rank: expected at least two photographs to compare, got {len(settings.support)}")
    if Path(settings.out).suffix.lower() in SUFFIXES:
        raise UserError(f"--out {settings.out}: expected the name of a class file, got a picture's; call it .class")
    target, marked = Path(settings.out), bool(settings.point or settings.box or settings.scribble or settings.other)
    if marked and settings.mask:
        raise UserError("--mask: expected masks or marks, got both; leave one of them out")
    masks = [] if marked else read_masks(settings.support, settings.mask, settings.mask_value)
    written = [target, *(_beside(target, len(settings.support)) if marked else ())]
    given = {Path(path).resolve() for path in (*settings.support, *settings.mask, *settings.scribble)}
    if taken := given & {path.resolve() for path in written}:
        raise UserError(f"--out {target}: would replace {taken.pop()}, one of the examples; choose another file")
    checkpoint = checkpoints.chosen(settings.checkpoint)
    checkpoints.read_record(checkpoint, "segmenter")
    marks = read_marks(settings) if marked else []
    predictor = checkpoints.load_predictor(checkpoint, settings.encoder_weights)
    done: dict[str, Any] = {"class": str(target), "name": settings.name, "shots": len(settings.support)}
    if marked:
        masks = shown(predictor, settings.support, marks, target)
        done["masks"] = [str(path) for path in written[2:]]
        agreed(written[1], settings.yes)
    opened = [read_photograph(path) for path in settings.support]
    predictor.register(opened, masks, settings.name).save(target)
    return done | {"ranks": ranked(predictor, settings.support, opened, masks)} if settings.rank else done


def _beside(target: Path, count: int) -> list[Path]:
    """The picture that is to be agreed with, and the masks."""
    return [Path(f"{target}.jpg"), *(Path(f"{target}.{n}.png") for n in range(1, count + 1))]


def read_marks(settings: Settings) -> "list[Marks]":
    """The marks of each photograph. Raises UserError for what is none, or if a photograph has none."""
    import numpy as np

    from fsdino.data.masks import read_label
    from fsdino.marks import Frame, Marks, Point

    count = len(settings.support)
    if not count:
        raise UserError("--support: expected at least one photograph, got none")
    if settings.scribble and len(settings.scribble) != count:
        raise UserError(f"--scribble: expected one for each of the {count} photographs, got {len(settings.scribble)}")
    points, others, boxes = (
        _numbered(flag, values, parts, count)
        for flag, values, parts in (
            ("--point", settings.point, 2),
            ("--other", settings.other, 2),
            ("--box", settings.box, 4),
        )
    )
    marks = []
    for number, path in enumerate(settings.support):
        if len(boxes[number]) > 1:
            raise UserError(f"--box: expected one box in {path}, got {len(boxes[number])}")
        scribble = read_label(settings.scribble[number]) if settings.scribble else None
        if scribble is not None and not set(np.unique(scribble).tolist()) <= {0, 1, 2}:
            raise UserError(f"--scribble {settings.scribble[number]}: expected values 0, 1 and 2, got others")
        if not points[number] and not boxes[number] and scribble is None:
            raise UserError(f"{path}: expected a --point, --box or --scribble for it, got none")
        box = Frame(*boxes[number][0]) if boxes[number] else None
        marks.append(Marks([Point(*p) for p in points[number]], [Point(*p) for p in others[number]], box, scribble))
    return marks


def _numbered(flag: str, values: Sequence[str], parts: int, count: int) -> list[list[list[float]]]:
    """Numbers by photograph: `2:10,20` is of the second."""
    found: list[list[list[float]]] = [[] for _ in range(count)]
    for value in values:
        number, _, rest = value.rpartition(":")
        try:
            of, numbers = int(number or 1), [float(part) for part in rest.split(",")]
        except ValueError:
            of, numbers = 0, []
        if len(numbers) != parts or not 1 <= of <= count:
            form = "X,Y" if parts == 2 else "LEFT,TOP,RIGHT,BOTTOM"
            raise UserError(f"{flag} {value}: expected {form} in pixels, with N: before it for photograph 1 to {count}")
        found[of - 1].append(numbers)
    return found


def shown(
    predictor: "Predictor", supports: Sequence[str], marks: "Sequence[Marks]", target: Path
) -> "list[np.ndarray]":
    """Masks of marked photographs, written beside the class file, and a picture of them."""
    import numpy as np
    from PIL import Image

    from fsdino.marks import mask_of
    from pipelines import panels

    picture, *files = _beside(target, len(supports))
    masks, rows = [], list[list[Image.Image | None]]()
    for path, of, file in zip(supports, marks, files, strict=True):
        image = read_photograph(path)
        mask = mask_of(predictor, image, of)
        Image.fromarray(mask.astype(np.uint8) * 255).save(file)
        rows.append([panels.cell(image), panels.overlay(image, mask)])
        masks.append(mask.astype(np.uint8))
    panels.panel(("photograph", "mask"), rows).save(picture)
    return masks


def agreed(picture: Path, yes: bool) -> None:
    """Ask whether the masks are right. Raises UserError if they are not, or if nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{picture}: look at the masks; if they are right, rerun with --yes, else add marks")
    print(f"{picture} shows the masks. Are they right? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("not registered; add points on the object (--point) or beside it (--other) and rerun")


def ranked(
    predictor: "Predictor", supports: Sequence[str], opened: "Sequence[Image.Image]", masks: "Sequence[np.ndarray]"
) -> list[dict[str, Any]]:
    """The photographs with what they are worth, those that help most first; also as a table for people."""
    ranks = zip(supports, predictor.rank(opened, masks), strict=True)
    rows = sorted(ranks, key=lambda row: -(row[1].found if row[1].helps is None else row[1].helps))
    print("found by the others (IoU), helps them (IoU)", file=sys.stderr)
    for path, rank in rows:
        helps = "-" if rank.helps is None else f"{rank.helps:+.3f}"
        print(f"{rank.found:8.3f} {helps:>8}  {path}", file=sys.stderr)
    return [{"support": path, **rank._asdict()} for path, rank in rows]


if __name__ == "__main__":
    main(Settings, job)
