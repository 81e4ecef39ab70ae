"""Coarse-to-fine distillation (Sec. 3.3.2): early and teacher stores in, an adapter out, frozen from then on.

    python -m pipelines.distill --recipe offline

Reads early@R for each resolution R of the recipe and teacher@RES; trains the adapter with MSE at each resolution in
turn, every stage starting from the best weights (on held-out images) of the one before. A ridge regression from the
same layer shows what each stage has to beat.
Cost: the paper's recipe trains 15 epochs at each of 126, 252 and 518 px; the offline one took 24 minutes on two cores
that other work shared.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fsdino.data.dataset import open_dataset
from fsdino.errors import UserError
from pipelines import checkpoints, stores
from pipelines.checks import check_batch
from pipelines.cli import main
from pipelines.recipes import Backbone, Device, Distillation, Places, RecipeName, Teaching, Workers
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


def job(settings: Settings) -> dict[str, Any]:
    """Check the stores, then train on Ray Train; a finished run is only reported."""
    places, backbone, distillation = settings.places, settings.backbone, settings.distillation
    if not distillation.distill_res:
        raise UserError("--distill-res: expected at least one resolution, got none")
    check_batch(distillation.distill_batch, settings.workers.workers)
    dataset = open_dataset(places.data)
    early = [
        stores.open_encoded(places, dataset.name, "early", backbone, res_px) for res_px in distillation.distill_res
    ]
    for store in early[1:]:
        stores.check_weights(store, early[0].fingerprint.weights)
    teacher = stores.open_teacher(places, dataset.name, settings.teaching.teacher, backbone.res)
    ids = list(stores.without_quarantined(dict.fromkeys(dataset.ids("train")), (teacher, *early)))
    stores.check_images(ids, teacher, *early)
    held_out, trained = split(ids, settings.workers.seed, distillation.validation_share)
    if len(trained) < distillation.distill_batch:
        raise UserError(
            f"{places.data}: expected at least {distillation.distill_batch} training images, "
            f"got {len(trained)}; lower --distill-batch"
        )
    origin = {
        "recipe": settings.recipe,
        "dataset": dataset.name,
        "early": asdict(early[-1].fingerprint),
        "teacher": asdict(teacher.fingerprint),
        "distillation": asdict(distillation),
        "seed": settings.workers.seed,
        "train_precision": settings.device.train_precision,
        "images": len(ids),
        "training_list": dataset.list_digest("train"),
    }
    run = RunFolder(
        folder=checkpoints.run_folder(places, dataset.name, backbone),
        name=checkpoints.distill_name(settings.teaching),
        experiment="distill",
        checkpoint="adapter",
        identity=identity(
            stores=[asdict(s.fingerprint) for s in early],
            features=[store.content(ids) for store in (*early, teacher)],
            **origin,
        ),
        tags={"dataset": dataset.name, **stores.fingerprint_tags(store.fingerprint for store in (*early, teacher))},
    )
    record = run.finished(places.tracking_uri)
    if record is None:
        from pipelines import distillation_loop, training

        planned = distillation_loop.DistillationJob(
            dataset, tuple(early), teacher, tuple(held_out), tuple(trained), distillation, settings.workers.seed, origin
        )
        training.train(run, distillation_loop.loop, planned, places, settings.workers, settings.device)
        record = checkpoints.read_record(run.final, "adapter")
    return {"adapter": run.final, "parameters": record["parameters"], "stages": record["stages"]}


def split(ids: list[str], seed: int, share: float) -> tuple[list[str], list[str]]:
    """Held-out and training images, from the seed alone."""
    order = np.random.default_rng([seed]).permutation(len(ids))
    cut = max(1, round(len(ids) * share))
    shuffled = [ids[i] for i in order]
    return shuffled[:cut], shuffled[cut:]


if __name__ == "__main__":
    main(Settings, job)
