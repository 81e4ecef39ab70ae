"""A class of your own as one file: photographs with masks in, what a segmenter makes of them out.

    python -m pipelines.register --checkpoint CHECKPOINT --name cat --support cat1.jpg --mask cat1.png --out cat.class

`python -m pipelines.predict --class cat.class` finds it in photographs. A class file belongs to its checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fsdino.data.masks import read_mask
from fsdino.errors import UserError
from fsdino.preprocess import read_image
from pipelines import checkpoints
from pipelines.checks import Place, Range, Weights
from pipelines.cli import main

if TYPE_CHECKING:
    import numpy as np


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
    out: str
    """The class file, on this machine."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check the examples, encode them, write the file."""
    masks = read_masks(settings.support, settings.mask, settings.mask_value)
    target = Path(settings.out)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--out {settings.out}: expected a file in a folder that exists")
    checkpoints.read_record(settings.checkpoint, "segmenter")
    predictor = checkpoints.load_predictor(settings.checkpoint, settings.encoder_weights)
    predictor.register(settings.support, masks, settings.name).save(target)
    return {"class": str(target), "name": settings.name, "shots": len(masks)}


def read_masks(supports: Sequence[str], masks: Sequence[str], value: int | None) -> "list[np.ndarray]":
    """Masks of photographs. Raises UserError, naming the flag, if there are none or one lacks the other."""
    if not supports:
        raise UserError("--support: expected at least one photograph, got none")
    if len(supports) != len(masks):
        raise UserError(f"--mask: expected one mask for each of the {len(supports)} supports, got {len(masks)}")
    sizes = [read_image(path).size for path in supports]
    return [read_mask(path, size, value) for path, size in zip(masks, sizes, strict=True)]


if __name__ == "__main__":
    main(Settings, job)
