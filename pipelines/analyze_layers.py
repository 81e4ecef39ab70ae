"""Which layer of the encoder sees an image as the teacher does: the paper's reason for distilling from layer 3.

    python -m pipelines.analyze_layers --recipe offline --images 64 --plot layers.png

For each layer: Pearson's r between its self-similarity map and the teacher's, over all pairs of positions, averaged
over images. Prints a table; table, plot and maps at a few points are also in MLflow's experiment `analyze/DATASET`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsdino.errors import UserError
from fsdino.specs import encoder_spec, teacher_spec
from pipelines import datasets
from pipelines.checks import Count, Picture, Seed
from pipelines.cli import main
from pipelines.recipes import Backbone, Device, Places, RecipeName, Teaching
from pipelines.runs import About


@dataclass(frozen=True)
class Settings:
    """Compare the self-similarity of every encoder layer with the teacher's."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    device: Device
    images: Count = 64
    """Training images, drawn from `seed`."""
    seed: Seed = 0
    """Seed of the choice."""
    plot: Picture | None = None
    """Also write the plot to this file."""


def job(settings: Settings) -> dict[str, Any]:
    """Run both networks over the images, average, show."""
    dataset, backbone = datasets.dataset_of(settings.places), settings.backbone
    ids = dataset.ids("train")
    if not 0 < settings.images <= len(ids):
        raise UserError(f"--images {settings.images}: expected 1 to {len(ids)}, the training images there are")
    chosen = [ids[i] for i in np.random.default_rng(settings.seed).permutation(len(ids))[: settings.images]]
    if backbone.early_norm or not backbone.late_norm:
        raise UserError("--early-norm, --no-late-norm: layers are compared without any norm; leave it out")
    encoder, teacher = encoder_spec(backbone.encoder), teacher_spec(settings.teaching.teacher)
    encoder.grid(backbone.res)
    from pipelines import layer_analysis, panels, tracking

    means, maps = layer_analysis.compare(dataset, chosen, backbone, settings.teaching, settings.device)
    best = max(means, key=lambda name: means[name])
    table = "\n".join(["| layer | r |", "|---|---|", *(f"| {name} | {r:.3f} |" for name, r in means.items())])
    print(table)
    picture = panels.curve(list(means), list(means.values()), f"agreement with {teacher.name}", encoder.name)
    params = {"encoder": encoder.name, "teacher": teacher.name, "res": backbone.res, "images": settings.images}
    read = (datasets.data_input(dataset, "train", chosen),)
    about = About("analyze", dataset.name, f"{encoder.name}@{backbone.res}", params, read)
    with tracking.running(settings.places.tracking_uri, about) as run:
        for number, r in enumerate(means.values()):
            run.log(number, agreement=r)
        run.picture(picture, "panels/layers.png")
        run.picture(maps, "panels/maps.png")
    if settings.plot:
        picture.save(settings.plot)
        maps.save(maps_path(Path(settings.plot)))
    return {"encoder": encoder.name, "teacher": teacher.name, "images": len(chosen), "agreement": means, "best": best}


def maps_path(plot: Path) -> Path:
    """Where the maps go that belong to a plot."""
    return plot.with_name(f"{plot.stem}-maps.png")


if __name__ == "__main__":
    main(Settings, job)
