"""A class of your own as one file: photographs with masks in, what a segmenter makes of them out.

    python -m pipelines.register --checkpoint CHECKPOINT --name cat --support cat1.jpg --mask cat1.png --out cat.class

`python -m pipelines.predict --class cat.class` finds it in photographs. A class file belongs to its checkpoint. Of
several photographs `--rank` says which help and which harm.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fsdino.errors import UserError
from pipelines import checkpoints
from pipelines.checks import NewFile, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import read_masks

if TYPE_CHECKING:
    import numpy as np

    from fsdino.predictor import Predictor


@dataclass(frozen=True)
class Settings:
    """Write a class file."""

    checkpoint: Place
    """Checkpoint folder of train_episodic (its `final`)."""
    name: str
    """What the class is called."""
    support: tuple[str, ...]
    """Photographs that show it."""
    mask: tuple[str, ...]
    """Their masks, in the same order."""
    out: Annotated[str, NewFile()]
    """The class file, on this machine."""
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
    masks = read_masks(settings.support, settings.mask, settings.mask_value)
    target = Path(settings.out)
    if target.resolve() in {Path(path).resolve() for path in (*settings.support, *settings.mask)}:
        raise UserError(f"--out {target}: would replace one of the examples; choose another file")
    checkpoints.read_record(settings.checkpoint, "segmenter")
    predictor = checkpoints.load_predictor(settings.checkpoint, settings.encoder_weights)
    predictor.register(settings.support, masks, settings.name).save(target)
    done: dict[str, Any] = {"class": str(target), "name": settings.name, "shots": len(masks)}
    return done | {"ranks": ranked(predictor, settings.support, masks)} if settings.rank else done


def ranked(predictor: "Predictor", supports: Sequence[str], masks: "Sequence[np.ndarray]") -> list[dict[str, Any]]:
    """The photographs with what they are worth, those that help most first; also as a table for people."""
    ranks = zip(supports, predictor.rank(supports, masks), strict=True)
    rows = sorted(ranks, key=lambda row: -(row[1].found if row[1].helps is None else row[1].helps))
    print("found by the others (IoU), helps them (IoU)", file=sys.stderr)
    for path, rank in rows:
        helps = "-" if rank.helps is None else f"{rank.helps:+.3f}"
        print(f"{rank.found:8.3f} {helps:>8}  {path}", file=sys.stderr)
    return [{"support": path, **rank._asdict()} for path, rank in rows]


if __name__ == "__main__":
    main(Settings, job)
