"""A class of your own as one file: photographs with masks in, what a segmenter makes of them out.

    python -m pipelines.register --checkpoint CHECKPOINT --name cat --support cat1.jpg --mask cat1.png --out cat.class

`python -m pipelines.predict --class cat.class` finds it in photographs. A class file belongs to its checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fsdino.errors import UserError
from pipelines import checkpoints
from pipelines.checks import NewFile, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import read_masks


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
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check the examples, encode them, write the file."""
    if not settings.name.strip():
        raise UserError("--name: expected what the class is called, got nothing")
    masks = read_masks(settings.support, settings.mask, settings.mask_value)
    target = Path(settings.out)
    if target.resolve() in {Path(path).resolve() for path in (*settings.support, *settings.mask)}:
        raise UserError(f"--out {target}: would replace one of the examples; choose another file")
    checkpoints.read_record(settings.checkpoint, "segmenter")
    predictor = checkpoints.load_predictor(settings.checkpoint, settings.encoder_weights)
    predictor.register(settings.support, masks, settings.name).save(target)
    return {"class": str(target), "name": settings.name, "shots": len(masks)}


if __name__ == "__main__":
    main(Settings, job)
