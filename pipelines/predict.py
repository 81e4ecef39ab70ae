"""Masks for your own class: photographs in, PNG masks of the photographs' own sizes out.

    python -m pipelines.predict --checkpoint outputs/runs/pascal-5i/fold0-4d/final \\
        --support cat1.jpg --mask cat1.png --query a.jpg b.jpg --out masks

One to five supports, each with a mask (non-zero is the object). Masks are 0 and 255; `panel.png` shows them all.
Runs on this machine alone, without stores.
"""

import tempfile
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fsdino.checkpoint import files as checkpoint_files
from fsdino.encoder import Encoder, Features, encoder_of_checkpoint
from fsdino.errors import UserError
from fsdino.preprocess import read_image, read_mask, resize_square, to_input
from fsdino.prompts import mask_to_grid
from fsdino.segmenter import Segmenter
from pipelines import panels, training
from pipelines.cli import main
from pipelines.recipes import RecipeName

PANEL = "panel.png"


@dataclass(frozen=True)
class Settings:
    """Segment the object that the supports show in each query photograph."""

    recipe: RecipeName
    checkpoint: str
    """Checkpoint folder of train_episodic (its `final`)."""
    support: tuple[str, ...]
    """Support photographs."""
    mask: tuple[str, ...]
    """Their masks, in the same order."""
    query: tuple[str, ...]
    """Photographs to segment."""
    out: str = "outputs/masks"
    """Folder on this machine for the masks."""
    encoder_weights: str | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Read everything first, so that a bad file costs no computing; then encode, segment, write."""
    for flag, given in (("--support", settings.support), ("--query", settings.query)):
        if not given:
            raise UserError(f"{flag}: expected at least one photograph, got none")
    if len(settings.support) != len(settings.mask):
        raise UserError(
            f"--mask: expected one mask for each of the {len(settings.support)} supports, got {len(settings.mask)}"
        )
    supports = [read_image(path) for path in settings.support]
    masks = [read_mask(path, image.size) for path, image in zip(settings.mask, supports, strict=True)]
    queries = [read_image(path) for path in settings.query]
    inputs = (*settings.support, *settings.mask, *settings.query)
    targets = mask_paths(settings.query, Path(settings.out), inputs)

    with tempfile.TemporaryDirectory() as folder:
        segmenter, record = Segmenter.load(training.fetch(settings.checkpoint, folder, checkpoint_files("segmenter")))
    encoder, res_px = encoder_of_checkpoint(record, settings.encoder_weights), record["encoder"]["res"]
    with torch.inference_mode():
        late = torch.cat([encode(encoder, image, res_px).late for image in supports])
        on_grid = [mask_to_grid(torch.from_numpy(mask).float()[None], late.shape[-1]) for mask in masks]
        class_encoding = segmenter.encode_support(late[None], torch.cat(on_grid)[None])
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        results, rows = [], []
        for path, image, target in zip(settings.query, queries, targets, strict=True):
            features = encode(encoder, image, res_px)
            predicted = segmenter.segment(features.late, segmenter.embed(features.early), class_encoding)
            logits = torch.nn.functional.interpolate(
                predicted.mask_logits, size=image.size[::-1], mode="bilinear", align_corners=False
            )
            found = (logits[0, 0] > 0).numpy()
            Image.fromarray(found.astype(np.uint8) * 255).save(target)
            results.append({"query": path, "mask": str(target), "foreground": round(float(found.mean()), 4)})
            prior = predicted.prior_logits
            shown = None if prior is None else panels.heat(prior[0, 0].sigmoid().numpy())
            rows.append([panels.overlay(supports[0], masks[0]), image, shown, panels.overlay(image, found)])
    picture = Path(settings.out) / PANEL
    panels.panel(("support", "query", "prior", "prediction"), rows).save(picture)
    return {"masks": results, "panel": str(picture), "shots": len(supports)}


def encode(encoder: Encoder, image: Image.Image, res_px: int) -> Features:
    """Features of one photograph."""
    return encoder(to_input(resize_square(image, res_px)[None], encoder.mean, encoder.std))


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
