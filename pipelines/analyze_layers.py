"""Which layer of the encoder sees an image as the teacher does: the paper's reason for distilling from layer 3.

    python -m pipelines.analyze_layers --recipe offline --images 64 --plot layers.png

For each layer: Pearson's r between its self-similarity map and the teacher's, over all pairs of positions, averaged
over images. Prints a table; table, plot and maps at a few points are also in MLflow's experiment `analyze`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsdino.data.voc import VocDataset
from fsdino.encoder import build_encoder
from fsdino.errors import UserError
from fsdino.preprocess import resize_square, to_input
from fsdino.similarity import agreement, self_similarity
from fsdino.teacher import build_teacher
from pipelines import panels, stages, tracking
from pipelines.cli import main
from pipelines.recipes import Computing, Encoding, Places, RecipeName, Teaching

SHOWN = 3


@dataclass(frozen=True)
class Settings:
    """Compare the self-similarity of every encoder layer with the teacher's."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    teaching: Teaching
    computing: Computing
    images: int = 64
    """Training images, drawn from `seed`."""
    seed: int = 0
    """Seed of the choice."""
    plot: str | None = None
    """Also write the plot to this file."""


def job(settings: Settings) -> dict[str, Any]:
    """Run both networks over the images, average, show."""
    dataset, encoding = VocDataset(settings.places.data), settings.encoding
    ids = dataset.ids("train")
    if not 0 < settings.images <= len(ids):
        raise UserError(f"--images {settings.images}: expected 1 to {len(ids)}, the training images there are")
    chosen = [ids[i] for i in np.random.default_rng(settings.seed).permutation(len(ids))[: settings.images]]
    if encoding.early_norm or not encoding.late_norm:
        raise UserError("--early-norm, --no-late-norm: layers are compared without any norm; leave it out")
    if settings.plot:
        check_plot(Path(settings.plot))
    device = stages.device_of(settings.computing)
    encoder: Any = build_encoder(encoding.encoder, encoding.encoder_weights)
    teacher: Any = build_teacher(settings.teaching.teacher, settings.teaching.teacher_weights)
    encoder.grid(encoding.res)
    encoder.to(device), teacher.to(device)

    scores: dict[str, list[float]] = {}
    shown: list[list[Image.Image | None]] = []
    with torch.inference_mode():
        for image_id in tqdm(chosen, unit="img", file=sys.stderr):
            image = dataset.image(image_id)
            seen = [resize_square(image, side)[None] for side in (encoding.res, teacher.input_px(encoding.res))]
            layers = encoder.layer_maps(to_input(seen[0], encoder.mean, encoder.std).to(device))
            target = teacher(to_input(seen[1], teacher.mean, teacher.std).to(device))
            for name, features in layers.items():
                scores.setdefault(name, []).append(float(agreement(features, target)[0]))
            if len(shown) < SHOWN * len(panels.POINTS):
                shown += maps_at_points(image, target, layers)
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    best = max(means, key=lambda name: means[name])
    table = "\n".join(["| layer | r |", "|---|---|", *(f"| {name} | {r:.3f} |" for name, r in means.items())])
    print(table)
    picture = panels.curve(list(means), list(means.values()), f"agreement with {teacher.name}", encoder.name)
    maps = panels.panel(("image", "teacher", *means), shown)
    params = {"encoder": encoder.name, "teacher": teacher.name, "res": encoding.res, "images": settings.images}
    with tracking.running(settings.places.tracking_uri, "analyze", f"{encoder.name}@{encoding.res}", params) as run_:
        for number, r in enumerate(means.values()):
            run_.log(number, agreement=r)
        run_.picture(picture, "panels/layers.png")
        run_.picture(maps, "panels/maps.png")
    if settings.plot:
        picture.save(settings.plot)
        maps.save(maps_path(Path(settings.plot)))
    return {"encoder": encoder.name, "teacher": teacher.name, "images": len(chosen), "agreement": means, "best": best}


def maps_path(plot: Path) -> Path:
    """Where the maps go that belong to a plot."""
    return plot.with_name(f"{plot.stem}-maps.png")


def check_plot(plot: Path) -> None:
    """Raise UserError if no picture can be written there."""
    if plot.suffix != ".png" or not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: expected a .png file in a folder that exists")


def maps_at_points(image: Image.Image, teacher: Tensor, layers: dict[str, Tensor]) -> list[list[Image.Image | None]]:
    """A row for each of a few points: what the teacher and each layer take for alike to it."""
    grid = min(teacher.shape[-1], next(iter(layers.values())).shape[-1])
    maps = [self_similarity(F.adaptive_avg_pool2d(x.float(), grid))[0] for x in (teacher, *layers.values())]
    rows: list[list[Image.Image | None]] = []
    for x, y in panels.POINTS:
        at = int(y * grid) * grid + int(x * grid)
        row: list[Image.Image | None] = [panels.marked(image, x, y)]
        row += [panels.heat(_stretched(similarity[at]).reshape(grid, grid).cpu().numpy()) for similarity in maps]
        rows.append(row)
    return rows


def _stretched(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp_min(1e-6)


if __name__ == "__main__":
    main(Settings, job)
