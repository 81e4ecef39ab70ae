"""The loop of distillation in one worker: all resolutions in turn, each from the best weights of the one before."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from fsdino.losses import distillation_loss
from fsdino.preprocess import read_image
from pipelines import checkpoints, panels, tracking, training
from pipelines.feeding import feeds
from pipelines.loading import ahead
from pipelines.recipes import Distillation

PANEL_IMAGES = 4
RIDGE_IMAGES = 4096  # a few million positions for fewer than two thousand weights of each channel


@dataclass(frozen=True)
class DistillationJob:
    """All that a worker needs, checked and opened by the driver. Stores reopen in the worker, which checks that they
    are still what they were."""

    shown: dict[str, str]
    """Held-out images of the panel, and their sources."""
    early: tuple[FeatureStore, ...]
    """One for each resolution, in their order."""
    teacher: FeatureStore
    held_out: tuple[str, ...]
    trained: tuple[str, ...]
    """Shuffled."""
    distillation: Distillation
    seed: int
    origin: dict[str, Any]
    """What the checkpoint's record says of where it comes from."""


def loop(job: DistillationJob, worker: training.Worker) -> None:
    """Train all stages; rank 0 logs and publishes."""
    distiller = Distiller(job, worker)
    state = training.load_state(worker) or {"stage": 0, "step": 0, "results": [], "adapter": distiller.weights()}
    while state["stage"] < len(job.early):
        reached = distiller.stage(state)
        if reached is None:
            return
        state = reached
        training.save_state(worker, {"stage": state["stage"], "step": 0}, **state)
    distiller.adapter.load_state_dict(state["adapter"])
    distiller.finish(state["results"])


class Distiller:
    """A worker's adapter, stores and images. Every rank holds the same adapter."""

    def __init__(self, job: DistillationJob, worker: training.Worker):
        self.job, self.worker, self.distillation = job, worker, job.distillation
        channels = (job.early[0].fingerprint.channels, job.teacher.fingerprint.channels)
        self.adapter = BottleneckAdapter(*channels).to(worker.device)
        self.model = ray.train.torch.prepare_model(self.adapter)
        stores, of = (job.teacher, *job.early), worker.settings
        opened = feeds(stores, worker.device, of.cache_memory_gb, of.cache_device_gb)
        self._feeds = {store.url: feed for store, feed in zip(stores, opened, strict=True)}

    def stage(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Train at one resolution from `state`; returns the state that the next stage starts from, None if it was
        asked to stop."""
        stage, first, worker = state["stage"], state["step"], self.worker
        store, res = self.job.early[stage], self.distillation.distill_res[stage]
        per_epoch = len(self.job.trained) // self.distillation.distill_batch
        steps = per_epoch * self.distillation.distill_epochs
        self.adapter.load_state_dict(state["adapter"])
        rate = self.distillation.distill_lr
        optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=rate, fused=True)
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
        best, best_mse, r2 = state.get("best", state["adapter"]), state.get("best_mse", float("inf")), 0.0
        pending, checkpointed = training.Losses(), time.monotonic()
        losses: dict[str, float] = {}
        chosen = self.batches(stage, first, steps, per_epoch)
        for done, (x, y) in enumerate(self.read_ahead(store, chosen), start=first + 1):
            optimiser.param_groups[0]["lr"] = rate * training.poly(done - 1, steps)
            with self.worker.autocast():
                predicted = self.model(x)
            loss = distillation_loss(predicted, y)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            pending.add(done, {"mse": loss.detach()})
            worker.meter.add(len(x))
            gathers = done % training.GATHER_EVERY == 0
            stop, due = worker.wishes(checkpointed) if gathers else (False, False)
            keeps = (stop or due or done % worker.settings.checkpoint_every == 0) and done < steps
            if gathers or keeps or done % per_epoch == 0:
                for at, losses in pending.gather():
                    worker.meter.tell(**losses)
                    self.log(at, steps, res, **losses, lr=rate * training.poly(at - 1, steps))
            if done % per_epoch == 0:
                # Rank 0 decides for all: a difference in rounding must not let ranks continue from different weights.
                mse, constant = training.from_rank_0(lambda: self.validate(store, self.student))
                self.log(done, steps, res, val_mse=mse, val_r2=1 - mse / constant)
                if mse < best_mse:
                    best, best_mse = self.weights(), mse
                r2 = 1 - best_mse / constant
            if keeps:
                training.check_weights(done, self.adapter)
                self.checkpoint()  # a checkpoint must not be ahead of the curves that lead to it
                kept: dict[str, Any] = {"adapter": self.adapter.state_dict(), "optimiser": optimiser.state_dict()}
                kept |= {"stage": stage, "step": done, "results": state["results"], "best": best, "best_mse": best_mse}
                training.save_state(worker, {"stage": stage, "step": done}, **kept)
                checkpointed = time.monotonic()
                if stop:
                    return None
        (ridge_r2,) = training.from_rank_0(lambda: (self.ridge_r2(store),))
        self.log(steps, steps, res, ridge_r2=ridge_r2)
        training.check_numbers(steps, {"val_mse": best_mse})
        training.check_weights(steps, self.adapter)
        self.checkpoint()
        result = {"res_px": res, "steps": steps, "val_mse": best_mse, "val_r2": r2, "ridge_r2": ridge_r2}
        return {"stage": stage + 1, "step": 0, "results": [*state["results"], result], "adapter": best}

    def batches(self, stage: int, first: int, steps: int, per_epoch: int) -> Iterator[list[str]]:
        """This worker's images of each step; the order of an epoch depends on (seed, stage, epoch) alone."""
        batch = self.distillation.distill_batch
        indices = training.worker_batches(first, steps, batch, self.worker.rank, self.worker.world)
        for step, wanted in enumerate(indices, start=first):
            epoch = step // per_epoch
            order = np.random.default_rng([self.job.seed, stage, epoch]).permutation(len(self.job.trained))
            yield [self.job.trained[order[i - epoch * per_epoch * batch]] for i in wanted]

    def pairs(self, store: FeatureStore, chosen: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Early features and teacher embeddings of these images."""
        return next(self.read_ahead(store, iter([chosen])))

    def read_ahead(self, store: FeatureStore, chosen: Iterator[Sequence[str]]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `pairs` for one batch after another, each read while the one before it is in use."""
        of = self.worker.settings
        for x, y in ahead(lambda ids: self._read(store, ids), chosen, of.feed_threads, of.feed_depth):
            yield x.float(), y.float()

    def _read(self, store: FeatureStore, chosen: Sequence[str]) -> tuple[Tensor, Tensor]:
        views = [0] * len(chosen)
        x, y = (self._feeds[of.url].rows(chosen, views) for of in (store, self.job.teacher))
        return x, y

    def student(self, x: Tensor) -> Tensor:
        """The adapter's embedding."""
        with self.worker.autocast():
            return self.adapter(x).float()

    @torch.inference_mode()
    def ridge_r2(self, store: FeatureStore) -> float:
        """What a linear map from the same layer reaches on the held-out images, with the penalty that suits them best:
        the baseline that a student must beat. Fitted to the training images, a random choice if there are many."""
        fit, batch = ridge.RidgeRegression(), self.distillation.distill_batch
        chosen = self.job.trained[:RIDGE_IMAGES]  # they are shuffled
        for x, y in self.read_ahead(store, (chosen[at : at + batch] for at in range(0, len(chosen), batch))):
            fit.add(x, F.interpolate(y, size=x.shape[-2:], mode="area"))
        scores = []
        for penalty in ridge.PENALTIES:
            mse, constant = self.validate(store, partial(ridge.apply, fit.solve(penalty)))
            scores.append(1 - mse / constant)
        return max(scores)

    @torch.inference_mode()
    def validate(self, store: FeatureStore, student: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """MSE on the held-out images, and the MSE of predicting each channel's mean (the zero of R^2). Targets are
        summed as they come: those of SA-1B would fill the memory."""
        squared, positions = 0.0, 0
        sums = torch.zeros(2, self.job.teacher.fingerprint.channels, dtype=torch.float64, device=self.worker.device)
        batch = self.distillation.distill_batch
        chunks = [self.job.held_out[at : at + batch] for at in range(0, len(self.job.held_out), batch)]
        for x, y in self.read_ahead(store, iter(chunks)):
            target = F.interpolate(y, size=x.shape[-2:], mode="area")
            squared += float(((student(x) - target) ** 2).sum())
            wide = target.double()
            sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
            positions += target.numel() // target.shape[1]
        mean, mean_square = sums / positions
        return squared / (positions * sums.shape[1]), float((mean_square - mean.square()).clamp_min(0).mean())

    def weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights."""
        return {key: value.detach().clone() for key, value in self.adapter.state_dict().items()}

    def log(self, done: int, steps: int, res: int, **metrics: float) -> None:
        """Metrics of a step under their resolution, and the step for the progress bar; from rank 0."""
        if self.worker.run:
            self.worker.report(f"distil {res} px", done, steps)
            self.worker.run.log(done, **{f"{name}_{res}px": value for name, value in metrics.items()})

    def checkpoint(self) -> None:
        """Send the metrics, or keep them."""
        if self.worker.run:
            self.worker.run.checkpoint()

    def finish(self, results: list[dict[str, Any]]) -> None:
        """Write the adapter, its panel and its record; from rank 0."""
        run, job = self.worker.run, self.job
        if run is None:
            return
        parameters = sum(p.numel() for p in self.adapter.parameters())
        final = f"{self.worker.folder}/final"
        run.folder(final, "adapter")
        run.keep("FINISHED")
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save(folder, stages=results, parameters=parameters, **job.origin, commit=tracking.commit())
            checkpoints.publish(folder, final)
        with tracking.optional(run, "the picture of embeddings"):
            picture = draw_panel(self.adapter, self.pairs(job.early[-1], list(job.shown)), list(job.shown.values()))
            run.picture(picture, "panels/embeddings.png")
        run.flush(at_once=True)
        run.keep()


@torch.inference_mode()
def draw_panel(adapter: BottleneckAdapter, pairs: tuple[Tensor, Tensor], sources: Sequence[str]) -> Image.Image:
    """Held-out images with the teacher's and the student's embedding at the last resolution."""
    early, teacher = pairs
    student = adapter(early)
    target = F.interpolate(teacher, size=student.shape[-2:], mode="area")
    maps = (x.movedim(1, -1).float().cpu().numpy() for x in (target, student))
    return panels.embeddings([read_image(source) for source in sources], *maps)
