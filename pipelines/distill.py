"""Coarse-to-fine distillation (Sec. 3.3.2): early and teacher stores in, a frozen-to-be adapter out.

    python -m pipelines.distill --recipe offline

Reads early@R for each resolution R of the recipe and teacher@RES; trains the adapter with MSE at each resolution in
turn, every stage starting from the best weights (on held-out images) of the one before. Each stage is held against a
ridge regression from the same layer.
Cost: the paper's recipe trains 15 epochs at each of 126, 252 and 518 px; the offline one took 24 minutes on two cores
that other work shared.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray.train.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from feature_store import FeatureStore
from fsdino import ridge
from fsdino.adapter import BottleneckAdapter
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from fsdino.losses import distillation_loss
from pipelines import panels, stages, tracking, training
from pipelines.cli import main
from pipelines.recipes import Computing, Distillation, Encoding, Places, RecipeName, Workers

PANEL_IMAGES = 4
RIDGE_IMAGES = 4096  # a few million positions for fewer than two thousand weights of each channel


@dataclass(frozen=True)
class Settings:
    """Distil the teacher's embedding into the adapter."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    distillation: Distillation
    workers: Workers
    computing: Computing


def job(settings: Settings) -> dict[str, Any]:
    """Check the stores, then train on Ray Train; a finished run is only reported."""
    dataset = VocDataset(settings.places.data)
    if settings.distillation.distill_epochs < 1 or not settings.distillation.distill_res:
        raise UserError("--distill-epochs, --distill-res: expected at least one epoch and one resolution")
    training.check_batch(settings.distillation.distill_batch, settings.workers.workers)
    early, teacher = open_stores(settings, dataset.name)
    models = {(s.fingerprint.model, s.fingerprint.weights) for s in early}
    if len(models) > 1:
        raise UserError(f"the early stores are of different encoders {sorted(models)}; extract them with one")
    held_out, trained = split(usable(dataset, early, teacher), settings)
    if len(trained) < settings.distillation.distill_batch:
        raise UserError(
            f"{settings.places.data}: expected at least {settings.distillation.distill_batch} training images, "
            f"got {len(trained)}; lower --distill-batch"
        )
    folder = f"{settings.places.out}/{dataset.name}"
    identity = training.identity_of(
        distillation=settings.distillation,
        seed=settings.workers.seed,
        train_precision=settings.computing.train_precision,
        early=[training.made_by(s.fingerprint) for s in early],
        teacher=training.made_by(teacher.fingerprint),
        images=len(trained) + len(held_out),
    )
    tags = {f"store.early.{s.fingerprint.res_px}": str(asdict(s.fingerprint)) for s in early}
    tags["store.teacher"] = str(asdict(teacher.fingerprint))
    config = {"settings": settings, "dataset": dataset, "folder": f"{folder}/distill"}
    training.run(
        name="distill",
        folder=folder,
        experiment="distill",
        loop=loop,
        config=config,
        places=settings.places,
        workers=settings.workers,
        computing=settings.computing,
        identity=identity,
        tags=tags,
        result="adapter",
    )
    adapter, record = training.read_adapter(f"{folder}/distill/final")
    return {"adapter": f"{folder}/distill/final", "parameters": num_parameters(adapter), "stages": record["stages"]}


def open_stores(settings: Settings, dataset: str) -> tuple[list[FeatureStore], FeatureStore]:
    """The early store of each resolution and the teacher's, checked for what they hold."""
    places, encoding = settings.places, settings.encoding
    early = [
        stages.open_store(places, dataset, "early", replace(encoding, res=res))
        for res in settings.distillation.distill_res
    ]
    url = stages.store_url(places.store, dataset, "teacher", encoding.res)
    return early, stages.open_at(places, url, {"feature": "teacher"})


def usable(dataset: VocDataset, early: list[FeatureStore], teacher: FeatureStore) -> list[str]:
    """Training images that have features in every store."""
    without = stages.quarantined(teacher, *early)
    return [image_id for image_id in dataset.ids("train") if image_id not in without]


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
    """One worker: all stages in turn, each from the best weights of the one before; rank 0 logs and writes."""
    distiller = Distiller(config)
    state = training.load_state() or {"stage": 0, "step": 0, "results": [], "adapter": distiller.weights()}
    while state["stage"] < len(distiller.early):
        state = distiller.stage(state)
        training.save_state(distiller.rank, {"stage": state["stage"], "step": 0}, **state)
    distiller.adapter.load_state_dict(state["adapter"])
    distiller.finish(state["results"])


class Distiller:
    """A worker's adapter, stores and images. Every rank holds the same adapter and validates it alike."""

    def __init__(self, config: dict[str, Any]):
        settings: Settings = config["settings"]
        self.config, self.settings, self.distillation = config, settings, settings.distillation
        self.device, self.rank, self.world = training.set_up(config)
        self.early, self.teacher = open_stores(settings, config["dataset"].name)
        self.held_out, self.ids = split(usable(config["dataset"], self.early, self.teacher), settings)
        channels = (self.early[0].fingerprint.channels, self.teacher.fingerprint.channels)
        self.adapter = BottleneckAdapter(*channels).to(self.device)
        self.model = ray.train.torch.prepare_model(self.adapter)
        self.run = tracking.Run(config["tracking_uri"], config["run_id"]) if self.rank == 0 else None

    def stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """Train at one resolution from `state`; returns the state that the next stage starts from."""
        stage, first, workers = state["stage"], state["step"], self.settings.workers
        store, res = self.early[stage], self.distillation.distill_res[stage]
        per_epoch = len(self.ids) // self.distillation.distill_batch
        steps = per_epoch * self.distillation.distill_epochs
        self.adapter.load_state_dict(state["adapter"])
        optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=self.distillation.distill_lr)
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
        best, best_mse, r2 = state.get("best", state["adapter"]), state.get("best_mse", float("inf")), 0.0
        for step, chosen in enumerate(self.batches(stage, first, steps, per_epoch), start=first):
            lr = optimiser.param_groups[0]["lr"] = self.distillation.distill_lr * training.poly(step, steps)
            x, y = self.pairs(store, chosen)
            with training.autocast(self.settings.computing, self.device):
                predicted = self.model(x)
            loss = distillation_loss(predicted, y)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done = step + 1
            self.log(done, steps, res, mse=loss.item(), lr=lr)
            if done % per_epoch == 0:
                # Rank 0 decides for all: where a rounding differs, ranks would go on from different weights.
                mse, constant = training.from_rank_0(lambda: self.validate(store, self.student))
                self.log(done, steps, res, val_mse=mse, val_r2=1 - mse / constant)
                if mse < best_mse:
                    best, best_mse = self.weights(), mse
                r2 = 1 - best_mse / constant
            if done % workers.checkpoint_every == 0 and done < steps:
                self.flush()  # a checkpoint must not be ahead of the curves that lead to it
                kept: dict[str, Any] = {"adapter": self.adapter.state_dict(), "optimiser": optimiser.state_dict()}
                kept |= {"stage": stage, "step": done, "results": state["results"], "best": best, "best_mse": best_mse}
                training.save_state(self.rank, {"stage": stage, "step": done}, **kept)
        (ridge_r2,) = training.from_rank_0(lambda: (self.ridge_r2(store),))
        self.log(steps, steps, res, ridge_r2=ridge_r2)
        self.flush()
        result = {"res_px": res, "steps": steps, "val_mse": best_mse, "val_r2": r2, "ridge_r2": ridge_r2}
        return {"stage": stage + 1, "step": 0, "results": [*state["results"], result], "adapter": best}

    def batches(self, stage: int, first: int, steps: int, per_epoch: int) -> Iterator[list[str]]:
        """This worker's images of each step; the order of an epoch depends on (seed, stage, epoch) alone."""
        batch = self.distillation.distill_batch
        indices = training.worker_batches(first, steps, batch, self.rank, self.world)
        for step, wanted in enumerate(indices, start=first):
            epoch = step // per_epoch
            order = np.random.default_rng([self.settings.workers.seed, stage, epoch]).permutation(len(self.ids))
            yield [self.ids[order[i - epoch * per_epoch * batch]] for i in wanted]

    def pairs(self, store: FeatureStore, chosen: list[str]) -> tuple[Tensor, Tensor]:
        """Early features and teacher embeddings of these images."""
        views = [0] * len(chosen)
        both = (store.rows(chosen, views), self.teacher.rows(chosen, views))
        x, y = (torch.from_numpy(a).movedim(-1, 1).to(self.device, torch.float32) for a in both)
        return x, y

    def student(self, x: Tensor) -> Tensor:
        """The adapter's embedding."""
        with training.autocast(self.settings.computing, self.device):
            return self.adapter(x).float()

    @torch.inference_mode()
    def ridge_r2(self, store: FeatureStore) -> float:
        """What a linear map from the same layer reaches on the held-out images, with the penalty that suits them best:
        the least that a student must do better. Fitted to the training images, a random choice if there are many."""
        fit, batch = ridge.RidgeRegression(), self.distillation.distill_batch
        chosen = self.ids[:RIDGE_IMAGES]  # `split` has shuffled them
        for at in range(0, len(chosen), batch):
            x, y = self.pairs(store, chosen[at : at + batch])
            fit.add(x, F.interpolate(y, size=x.shape[-2:], mode="area"))
        scores = []
        for penalty in ridge.PENALTIES:
            mse, constant = self.validate(store, partial(ridge.predict, fit.solve(penalty)))
            scores.append(1 - mse / constant)
        return max(scores)

    @torch.inference_mode()
    def validate(self, store: FeatureStore, predict: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """MSE on the held-out images, and the MSE of predicting each channel's mean (the zero of R^2)."""
        squared, targets = 0.0, []
        for at in range(0, len(self.held_out), self.distillation.distill_batch):
            x, y = self.pairs(store, self.held_out[at : at + self.distillation.distill_batch])
            targets.append(F.interpolate(y, size=x.shape[-2:], mode="area"))
            squared += float(((predict(x) - targets[-1]) ** 2).sum())
        target = torch.cat(targets)
        return squared / target.numel(), float(target.var((0, 2, 3), unbiased=False).mean())

    def weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights."""
        return {key: value.detach().clone() for key, value in self.adapter.state_dict().items()}

    def log(self, done: int, steps: int, res: int, **metrics: float) -> None:
        """Metrics of a step under their resolution, and the step for the progress bar; from rank 0."""
        if self.run:
            self.config["progress"].tell.remote(f"distil {res} px", done, steps)
            self.run.log(done, **{f"{name}_{res}px": value for name, value in metrics.items()})

    def flush(self) -> None:
        """Send the metrics."""
        if self.run:
            self.run.flush()

    def finish(self, results: list[dict[str, Any]]) -> None:
        """Write the adapter, its panel and its record; from rank 0."""
        if self.run is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            of = {"encoder": asdict(self.early[-1].fingerprint), "teacher": asdict(self.teacher.fingerprint)}
            self.adapter.save(folder, stages=results, of=of, commit=tracking.commit())
            self.run.folder(folder, "adapter")
            shown = self.held_out[:PANEL_IMAGES]
            picture = draw_panel(self.config["dataset"], self.adapter, self.pairs(self.early[-1], shown), shown)
            self.run.picture(picture, "panels/embeddings.png")
            self.flush()
            training.publish(folder, f"{self.config['folder']}/final")  # last: it says that all is done


@torch.inference_mode()
def draw_panel(
    dataset: VocDataset, adapter: BottleneckAdapter, pairs: tuple[Tensor, Tensor], ids: list[str]
) -> Image.Image:
    """Held-out images with the teacher's and the student's embedding at the last resolution."""
    early, teacher = pairs
    student = adapter(early)
    target = F.interpolate(teacher, size=student.shape[-2:], mode="area")
    maps = (x.movedim(1, -1).float().cpu().numpy() for x in (target, student))
    return panels.embeddings([dataset.image(image_id) for image_id in ids], *maps)


if __name__ == "__main__":
    main(Settings, job)
