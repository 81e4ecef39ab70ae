"""Coarse-to-fine distillation (Sec. 3.3.2): early and teacher stores in, a frozen-to-be adapter out.

    python -m pipelines.distill --recipe offline

Reads early@R for each resolution R of the recipe and teacher@RES; trains the adapter with MSE at each resolution in
turn, every stage starting from the best weights (on held-out images) of the one before.
Cost: the paper's recipe trains 15 epochs at each of 126, 252 and 518 px; the offline one takes 8 minutes on two cores.
"""

import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.train.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from feature_store import FeatureStore
from fsdino.adapter import BottleneckAdapter
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from fsdino.losses import distillation_loss
from pipelines import panels, stages, tracking, training
from pipelines.cli import main
from pipelines.recipes import Distillation, Encoding, Places, RecipeName, Workers

PANEL, PANEL_ROWS = "panels/embeddings.png", 4


@dataclass(frozen=True)
class Settings:
    """Distil the teacher's embedding into the adapter."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    distillation: Distillation
    workers: Workers


def job(settings: Settings) -> dict[str, Any]:
    """Check the stores, then train on Ray Train; a finished run is only reported."""
    dataset = VocDataset(settings.places.data)
    training.check_batch(settings.distillation.distill_batch, settings.workers.workers)
    early, teacher = open_stores(settings, dataset.name)
    models = {(s.fingerprint.model, s.fingerprint.weights) for s in early}
    if len(models) > 1:
        raise UserError(f"the early stores are of different encoders {sorted(models)}; extract them with one")
    held_out, trained = split(dataset.ids("train"), settings)
    if len(trained) < settings.distillation.distill_batch:
        raise UserError(
            f"{settings.places.data}: expected at least {settings.distillation.distill_batch} training images, "
            f"got {len(trained)}; lower --distill-batch"
        )
    folder = f"{settings.places.out}/{dataset.name}"
    identity = training.identity_of(
        distillation=settings.distillation,
        seed=settings.workers.seed,
        train_precision=settings.workers.train_precision,
        encoder_weights=early[0].fingerprint.weights,
        teacher_weights=teacher.fingerprint.weights,
        images=len(trained) + len(held_out),
    )
    tags = {f"store.early.{s.fingerprint.res_px}": str(asdict(s.fingerprint)) for s in early}
    tags["store.teacher"] = str(asdict(teacher.fingerprint))
    config = {"settings": settings, "dataset": dataset, "folder": f"{folder}/distill"}
    places, workers = settings.places, settings.workers
    training.run("distill", folder, "distill", loop, config, places, workers, identity, tags, "adapter")
    adapter, record = training.read_adapter(f"{folder}/distill/final")
    return {"adapter": f"{folder}/distill/final", "parameters": num_parameters(adapter), "stages": record["stages"]}


def open_stores(settings: Settings, dataset: str) -> tuple[list[FeatureStore], FeatureStore]:
    """The early store of each resolution and the teacher's, checked for what they hold."""
    root, res = settings.places.store, settings.encoding.res
    early = [
        FeatureStore(stages.store_url(root, dataset, "early", r), {"feature": "early", "res_px": r})
        for r in settings.distillation.distill_res
    ]
    return early, FeatureStore(stages.store_url(root, dataset, "teacher", res), {"feature": "teacher"})


def split(ids: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Held-out and training images, from the seed alone."""
    order = np.random.default_rng([settings.workers.seed]).permutation(len(ids))
    cut = max(1, round(len(ids) * settings.distillation.validation_share))
    shuffled = [ids[i] for i in order]
    return shuffled[:cut], shuffled[cut:]


def num_parameters(module: torch.nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in module.parameters())


def loop(config: dict[str, Any]) -> None:
    """One worker: all stages in turn. Every rank holds the same adapter; rank 0 logs and writes."""
    settings: Settings = config["settings"]
    distillation = settings.distillation
    device, rank, world = training.set_up(config)
    early, teacher = open_stores(settings, config["dataset"].name)
    held_out, ids = split(config["dataset"].ids("train"), settings)
    adapter = BottleneckAdapter(early[0].fingerprint.channels, teacher.fingerprint.channels).to(device)
    model = ray.train.torch.prepare_model(adapter)
    run = tracking.Run(config["tracking_uri"], config["run_id"]) if rank == 0 else None

    def pairs(store: FeatureStore, chosen: list[str]) -> tuple[Tensor, Tensor]:
        views = [0] * len(chosen)
        both = (store.read(store.rows(chosen, views)), teacher.read(teacher.rows(chosen, views)))
        x, y = (torch.from_numpy(a).movedim(-1, 1).to(device, torch.float32) for a in both)
        return x, y

    @torch.inference_mode()
    def validate(store: FeatureStore) -> tuple[float, float]:
        """MSE on the held-out images, and the MSE of predicting each channel's mean (the zero of R^2)."""
        squared, count, constant = 0.0, 0, []
        for at in range(0, len(held_out), distillation.distill_batch):
            x, y = pairs(store, held_out[at : at + distillation.distill_batch])
            target = F.interpolate(y, size=x.shape[-2:], mode="area")
            with training.autocast(settings.workers, device):
                predicted = adapter(x).float()
            squared += float(((predicted - target) ** 2).sum())
            count += target.numel()
            constant.append(target)
        return squared / count, float(torch.cat(constant).var((0, 2, 3), unbiased=False).mean())

    state = training.load_state() or {"stage": 0, "step": 0, "best_mse": float("inf"), "results": []}
    if "adapter" in state:
        adapter.load_state_dict(state["adapter"])
    for stage in range(state["stage"], len(early)):
        store, res = early[stage], distillation.distill_res[stage]
        per_epoch = len(ids) // distillation.distill_batch
        steps = per_epoch * distillation.distill_epochs
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=distillation.distill_lr)
        if "optimiser" in state:
            optimiser.load_state_dict(state.pop("optimiser"))
        first = state["step"]
        best = state.get("best") or {k: v.clone() for k, v in adapter.state_dict().items()}
        order: list[str] = []
        shuffled = -1
        for step, indices in enumerate(
            training.worker_batches(first, steps, distillation.distill_batch, rank, world), start=first
        ):
            epoch = step // per_epoch
            if epoch != shuffled:
                rng = np.random.default_rng([settings.workers.seed, stage, epoch])
                order, shuffled = [ids[i] for i in rng.permutation(len(ids))], epoch
            offset = epoch * per_epoch * distillation.distill_batch
            x, y = pairs(store, [order[i - offset] for i in indices])
            optimiser.param_groups[0]["lr"] = distillation.distill_lr * training.poly(step, steps)
            with training.autocast(settings.workers, device):
                predicted = model(x)
            loss = distillation_loss(predicted, y)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done = step + 1
            if run:
                config["progress"].tell.remote(f"distil {res} px", done, steps)
                run.log(done, **{f"mse_{res}px": loss.item(), f"lr_{res}px": optimiser.param_groups[0]["lr"]})
            if done % per_epoch == 0:
                mse, constant = validate(store)
                if mse < state["best_mse"]:
                    state["best_mse"], best = mse, {k: v.clone() for k, v in adapter.state_dict().items()}
                if run:
                    run.log(done, **{f"val_mse_{res}px": mse, f"val_r2_{res}px": 1 - mse / constant})
                    run.flush()
                if done == steps:
                    result = {
                        "res_px": res,
                        "steps": steps,
                        "val_mse": state["best_mse"],
                        "val_r2": 1 - state["best_mse"] / constant,
                    }
                    state["results"] = [*state["results"], result]
            if done % settings.workers.checkpoint_every == 0 and done < steps:
                if run:  # a checkpoint must not be ahead of the curves that lead to it
                    run.flush()
                kept = {"stage": stage, "step": done, "best_mse": state["best_mse"], "results": state["results"]}
                kept |= {"adapter": adapter.state_dict(), "best": best, "optimiser": optimiser.state_dict()}
                training.save_state(rank, {"stage": stage, "step": done}, **kept)
        adapter.load_state_dict(best)
        state = {"stage": stage + 1, "step": 0, "best_mse": float("inf"), "results": state["results"]}
        training.save_state(rank, {"stage": stage + 1, "step": 0}, **state, adapter=adapter.state_dict())
    if run:
        with tempfile.TemporaryDirectory() as folder:
            of = {"encoder": asdict(early[-1].fingerprint), "teacher": asdict(teacher.fingerprint)}
            adapter.save(folder, stages=state["results"], of=of, commit=tracking.commit())
            run.folder(folder, "adapter")
            run.picture(
                draw_panel(config["dataset"], adapter, pairs(early[-1], held_out[:PANEL_ROWS]), held_out), PANEL
            )
            training.publish(folder, f"{config['folder']}/final")
        run.flush()


@torch.inference_mode()
def draw_panel(
    dataset: VocDataset, adapter: BottleneckAdapter, pairs: tuple[Tensor, Tensor], ids: list[str]
) -> Image.Image:
    """Held-out images with the teacher's and the student's embedding at the last resolution."""
    early, teacher = pairs
    student = adapter(early)
    target = F.interpolate(teacher, size=student.shape[-2:], mode="area")
    maps = (x.movedim(1, -1).float().cpu().numpy() for x in (target, student))
    return panels.embeddings([dataset.image(image_id) for image_id in ids[: len(early)]], *maps)


if __name__ == "__main__":
    main(Settings, job)
