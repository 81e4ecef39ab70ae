"""Coarse-to-fine distillation (Sec. 3.3.2): early and teacher stores in, an adapter out, frozen from then on.

    python -m pipelines.distill --recipe offline
    python -m pipelines.distill --images SA-1B --share 0.01

Reads early@R for each resolution R of the recipe and the teacher's embeddings, of a data set's training images or of
any photographs; the adapter belongs to encoder and teacher, and bakes embeddings of any data set. Trains with MSE at
each resolution in turn, every stage starting from the best weights (on held-out images) of the one before. A ridge
regression from the same layer shows what each stage has to beat.
Cost: the paper's recipe trains 15 epochs at each of 126, 252 and 518 px; the offline one took 24 minutes on two cores
that other work shared.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fsdino.data.dataset import list_digest
from fsdino.data.views import PLAIN
from fsdino.errors import UserError
from pipelines import checkpoints, datasets, stores
from pipelines.checks import check_batch
from pipelines.cli import main
from pipelines.recipes import Backbone, Device, Distillation, Photographs, Places, RecipeName, Teaching, Workers
from pipelines.runs import RunFolder, identity


@dataclass(frozen=True)
class Settings:
    """Distil the teacher's embedding into the adapter."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    distillation: Distillation
    workers: Workers
    device: Device
    photographs: Photographs


def job(settings: Settings) -> dict[str, Any]:
    """Check the stores, then train on Ray Train; a finished run just prints its result."""
    places, backbone, distillation = settings.places, settings.backbone, settings.distillation
    if not distillation.distill_res:
        raise UserError("--distill-res: expected at least one resolution, got none")
    check_batch(distillation.distill_batch, settings.workers.workers)
    name, sources, listed = images_of(settings)
    early = [stores.open_encoded(places, name, "early", backbone, res_px) for res_px in distillation.distill_res]
    for store in early[1:]:
        stores.check_weights(store, early[0].fingerprint.weights)
    teacher = stores.open_teacher(places, name, settings.teaching.teacher, backbone.res)
    ids = list(stores.without_quarantined(sources, (teacher, *early)))
    stores.check_images(ids, PLAIN, teacher, *early)
    held_out, trained = split(ids, settings.workers.seed, distillation.validation_share)
    if len(trained) < distillation.distill_batch:
        raise UserError(
            f"{name}: expected at least {distillation.distill_batch} training images, "
            f"got {len(trained)}; lower --distill-batch"
        )
    origin = {
        "recipe": settings.recipe,
        "dataset": name,
        "early": asdict(early[-1].fingerprint),
        "teacher": asdict(teacher.fingerprint),
        "distillation": asdict(distillation),
        "seed": settings.workers.seed,
        "train_precision": settings.device.train_precision,
        "images": len(ids),
        "training_list": listed,
    }
    run = RunFolder(
        folder=checkpoints.adapters_folder(places, backbone),
        name=checkpoints.distill_name(settings.teaching, name),
        pipeline="distill",
        dataset=name,
        checkpoint="adapter",
        identity=identity(
            stores=[asdict(s.fingerprint) for s in early],
            features=[store.content(ids) for store in (*early, teacher)],
            **origin,
        ),
        inputs=stores.inputs((*early, teacher), "training"),
    )
    record = run.finished(places.tracking_uri)
    if record is None:
        from pipelines import distillation_loop, training

        planned = distillation_loop.DistillationJob(
            {image_id: sources[image_id] for image_id in held_out[: distillation_loop.PANEL_IMAGES]},
            tuple(early),
            teacher,
            tuple(held_out),
            tuple(trained),
            distillation,
            settings.workers.seed,
            origin,
        )
        training.train(run, distillation_loop.loop, planned, places, settings.workers, settings.device)
        record = checkpoints.read_record(run.final, "adapter")
    return {"adapter": run.final, "parameters": record["parameters"], "stages": record["stages"]}


def images_of(settings: Settings) -> tuple[str, dict[str, str], str]:
    """The name of the set of images, each image's source, and a digest of the list."""
    if settings.photographs.images is None:
        dataset = datasets.dataset_of(settings.places)
        return dataset.name, {i: dataset.source(i) for i in dataset.ids("train")}, dataset.list_digest("train")
    sources = datasets.listed(settings.photographs, settings.places.skip_bad)
    return datasets.photographs_name(settings.photographs), sources, list_digest(sources)


def split(ids: list[str], seed: int, share: float) -> tuple[list[str], list[str]]:
    """Held-out and training images, from the seed alone."""
    order = np.random.default_rng([seed]).permutation(len(ids))
    cut = max(1, round(len(ids) * share))
    shuffled = [ids[i] for i in order]
    return shuffled[:cut], shuffled[cut:]


if __name__ == "__main__":
    main(Settings, job)
