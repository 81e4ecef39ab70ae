"""Masks for your own class: photographs in, PNG masks of the photographs' own sizes out.

    python -m pipelines.predict --checkpoint CHECKPOINT \\
        --support cat1.jpg --mask cat1.png --query a.jpg b.jpg --out masks

One to five supports, each with a mask (the brighter of two values is the object). Masks are 0 and 255; `panel.png`
shows the first 50. Runs on this machine alone, without stores; fsdino.Predictor does the same in Python.
"""

from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

from feature_store.urls import is_url
from fsdino.data.masks import read_mask
from fsdino.errors import UserError, first_line
from fsdino.preprocess import read_image
from pipelines import checkpoints
from pipelines.checks import Folder, Place, Range, Weights
from pipelines.cli import main

PANEL, PANEL_ROWS = "panel.png", 50


@dataclass(frozen=True)
class Settings:
    """Segment the object that the supports show in each query photograph."""

    checkpoint: Place
    """Checkpoint folder of train_episodic (its `final`)."""
    support: tuple[str, ...]
    """Support photographs."""
    mask: tuple[str, ...]
    """Their masks, in the same order."""
    query: tuple[str, ...]
    """Photographs to segment."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    out: Folder = "outputs/masks"
    """Folder on this machine for the masks."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check supports, masks and checkpoint, register, then segment one photograph after another.

    A photograph that cannot be read costs no other its mask; it is named at the end.
    """
    for flag, given in (("--support", settings.support), ("--query", settings.query)):
        if not given:
            raise UserError(f"{flag}: expected at least one photograph, got none")
    if len(settings.support) != len(settings.mask):
        raise UserError(
            f"--mask: expected one mask for each of the {len(settings.support)} supports, got {len(settings.mask)}"
        )
    sizes = [read_image(path).size for path in settings.support]
    masks = [read_mask(path, size, settings.mask_value) for path, size in zip(settings.mask, sizes, strict=True)]
    for path in settings.query:
        if not is_url(path) and not Path(path).exists():
            read_image(path)  # says so
    targets = mask_paths(settings.query, Path(settings.out), (*settings.support, *settings.mask, *settings.query))
    checkpoints.read_record(settings.checkpoint, "segmenter")

    import numpy as np
    from PIL import Image

    from pipelines import panels

    predictor = checkpoints.load_predictor(settings.checkpoint, settings.encoder_weights)
    encoding = predictor.register(settings.support, masks)
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    shown_support = panels.overlay(read_image(settings.support[0]), masks[0] == 1)
    results, unread = [], []
    rows: list[list[Image.Image | None]] = []
    for path, target in zip(settings.query, targets, strict=True):
        try:
            image = read_image(path)
        except (UserError, OSError) as error:
            unread.append(first_line(error))
            continue
        predictor.set_image(image)
        ((logits, prior),) = predictor.logits([encoding])
        mask = logits[0].numpy() > 0
        Image.fromarray(mask.astype(np.uint8) * 255).save(target)
        results.append({"query": path, "mask": str(target), "foreground": round(float(mask.mean()), 4)})
        if len(rows) == PANEL_ROWS:
            continue
        shown = None if prior is None else panels.heat(prior[0].sigmoid().numpy())
        rows.append([shown_support, panels.cell(image), shown, panels.overlay(image, mask)])
    picture = Path(settings.out) / PANEL
    if rows:
        panels.panel(("support", "query", "prior", "prediction"), rows).save(picture)
    if unread:
        raise UserError(f"{len(unread)} of {len(targets)} photographs were not segmented; the first: {unread[0]}")
    return {"masks": results, "panel": str(picture), "shots": len(masks)}


def mask_paths(queries: tuple[str, ...], out: Path, inputs: tuple[str, ...]) -> list[Path]:
    """One PNG per query, numbered where a name is taken; never the panel. UserError if it would replace an input."""
    taken = {(out / PANEL).resolve()}
    given = {Path(path).resolve() for path in inputs}
    paths = []
    for query in queries:
        stem = Path(query).stem
        numbered = (out / f"{stem}{suffix}.png" for suffix in chain([""], (f"-{n}" for n in count(2))))
        path = next(p for p in numbered if p.resolve() not in taken)
        if path.resolve() in given:
            raise UserError(f"--out {out}: the mask of {query} would overwrite the input {path}; choose another folder")
        taken.add(path.resolve())
        paths.append(path)
    return paths


if __name__ == "__main__":
    main(Settings, job)
