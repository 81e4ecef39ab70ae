"""The loop of episodic training in one worker: its share of every step's episodes."""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray.train.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from feature_store import FeatureStore
from fsdino import paper
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.folds import in_words
from fsdino.episodic import EpisodeBatch, EpisodeLoss, segment_batch
from fsdino.metrics import FewShotScore, count
from fsdino.segmenter import Segmenter
from fsdino.state import sam_decoder_state
from pipelines import checkpoints, panels, presence_fit, tracking, training
from pipelines.checkpoints import AdapterPlan
from pipelines.loading import EpisodeLoader
from pipelines.recipes import Episodic

PANEL_ROWS = 4
PANELS = 8  # pictures of the same episodes, over a training
FLUSH_EVERY = 50  # steps
SAM_PARTS = ("decoder.", "mask_downscaling.", "positional_encoding.")


@dataclass(frozen=True)
class EpisodicJob:
    """All that a worker needs, checked and opened by the driver. Stores reopen in the worker, which checks that they
    are still what they were."""

    dataset: Dataset
    late: FeatureStore
    query: FeatureStore
    """Embeddings, or `early` for an adapter that is trained along."""
    sampler: EpisodeSampler
    model: SegmenterConfig
    shape: SegmenterShape
    episodic: Episodic
    steps: int
    label_px: int
    void_is_background: bool
    """Whether a query's void counts as background in the loss."""
    validation: EpisodeSampler | None
    """Episodes that choose the best weights."""
    lacking: dict[str, list[int]] | None
    """Training images that lack classes, and which, for a model that scores presence."""
    origin: dict[str, Any]
    """What the checkpoint's record says of where it comes from."""
    adapter: dict[str, Tensor]
    decoder: dict[str, Tensor]
    """SAM's decoder under the segmenter's names; empty for random weights."""


def initial_weights(
    adapter: AdapterPlan, model: SegmenterConfig, decoder_weights: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states that a segmenter starts with: the adapter's and SAM's decoder's."""
    decoder = {} if model.sam_decoder is None else sam_decoder_state(model.sam_decoder, decoder_weights)
    return adapter.load().state_dict(), decoder


def build_segmenter(job: EpisodicJob) -> Segmenter:
    """A fresh segmenter around the adapter, its decoder from SAM's checkpoint if the recipe names one."""
    segmenter = Segmenter(job.model, job.shape)
    segmenter.adapter.load_state_dict(job.adapter)
    if job.decoder:
        missing, unknown = segmenter.load_state_dict(job.decoder, strict=False)
        assert not unknown and not any(key.startswith(SAM_PARTS) for key in missing)
    return segmenter


def parameter_groups(segmenter: Segmenter, episodic: Episodic) -> list[dict[str, Any]]:
    """Two learning rates: the decoder's, and that of all other trainable layers."""
    groups: dict[float, list[nn.Parameter]] = {episodic.lr: [], episodic.decoder_lr: []}
    for name, parameter in segmenter.named_parameters():
        if parameter.requires_grad:
            groups[episodic.decoder_lr if name.startswith(SAM_PARTS) else episodic.lr].append(parameter)
    return [{"params": parameters, "lr": lr, "initial_lr": lr} for lr, parameters in groups.items()]


def loop(job: EpisodicJob, worker: training.Worker) -> None:
    """Train, checkpoint, and publish the segmenter from rank 0."""
    loader = EpisodeLoader(
        job.dataset,
        job.late,
        job.query,
        job.late.fingerprint.view_seed,
        job.label_px,
        void_is_background=job.void_is_background,
        device=worker.device,
        memory_gb=worker.settings.cache_memory_gb,
        device_gb=worker.settings.cache_device_gb,
    )
    checker = copy.copy(loader)  # it scores void as nothing, whatever the loss makes of it
    checker.void_is_background = False
    segmenter = build_segmenter(job).to(worker.device)
    averaged = moving_average(segmenter, job.episodic.ema)
    published: Any = segmenter if averaged is None else averaged.module
    model = ray.train.torch.prepare_model(objective(segmenter, job.episodic, worker))
    optimiser = torch.optim.AdamW(
        parameter_groups(segmenter, job.episodic), weight_decay=paper.WEIGHT_DECAY, fused=True
    )
    run, steps = worker.run, job.steps

    first, seconds = 0, 0.0
    best: dict[str, Any] = {"miou": -1.0, "step": 0, "weights": {}}
    if (state := training.load_state(worker)) is not None:
        segmenter.load_state_dict(state["segmenter"])
        optimiser.load_state_dict(state["optimiser"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        first, seconds, best = state["step"], state["seconds"], state["best"]
    clock, feeding = training.Stopwatch(seconds), training.Waiting()
    pending, checkpointed = training.Losses(), time.monotonic()
    losses: dict[str, float] = {}
    feed = fed(loader, job, worker, first)
    for done in range(first + 1, steps + 1):
        rate = training.poly(done - 1, steps)
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * rate
        with feeding:
            parts = list(islice(feed, job.episodic.accumulate))
        pending.add(done, train_step(model, optimiser, parts, worker, job.episodic.clip))
        if averaged is not None:
            averaged.update_parameters(segmenter)
        worker.meter.add(job.episodic.batch // worker.world)
        worker.report(f"train {in_words(job.sampler.fold)}", done, steps)
        validates = job.validation is not None and (done % job.episodic.validate_every == 0 or done == steps)
        gathers = done % training.GATHER_EVERY == 0
        stop, due = worker.wishes(checkpointed) if gathers else (False, False)
        keeps = (stop or due or done % worker.settings.checkpoint_every == 0) and done < steps
        if validates or keeps or done == steps or gathers:
            for step, losses in pending.gather():
                worker.meter.tell(**losses)
                if run:
                    run.log(step, **losses, lr=job.episodic.lr * training.poly(step - 1, steps))
        if done % FLUSH_EVERY == 0:
            fed_by = {"waiting_share": feeding.share(), "cache_hit_share": loader.hit_share()}
            worker.meter.tell(**fed_by)
            if run:
                run.log(done, **fed_by)
                run.measure_machine(done)
                run.flush()
        if run and done % max(1, steps // PANELS) == 0:
            with tracking.optional(run, "the picture of training"):
                picture = draw_panel(published, loader, job.sampler, worker.device)
                run.picture_of_step(picture, "training episodes", done)
        if validates:
            # Rank 0 decides for all: a difference in rounding must not let ranks resume from different weights.
            (miou,) = training.from_rank_0(lambda: (validate(published, checker, job, worker),))
            if run:
                run.log(done, val_miou=miou)
            if miou > best["miou"]:
                weights = {key: value.detach().cpu().clone() for key, value in published.state_dict().items()}
                best = {"miou": miou, "step": done, "weights": weights}
        if keeps:
            training.check_weights(done, segmenter)
            if run:  # a checkpoint must not be ahead of the curves that lead to it
                run.checkpoint()
            kept = {"segmenter": segmenter.state_dict(), "optimiser": optimiser.state_dict(), "seconds": clock.total()}
            kept |= {"best": best, "averaged": None if averaged is None else averaged.state_dict()}
            training.save_state(worker, {"step": done, **losses}, step=done, **kept)
            checkpointed = time.monotonic()
            if stop:
                return
    training.check_weights(steps, published)
    if run:
        result: dict[str, Any] = {
            "trained_parameters": sum(p.numel() for p in segmenter.parameters() if p.requires_grad),
            "loss": losses.get("loss"),
            "seconds": round(clock.total(), 1),
            "seconds_per_step": round(clock.total() / steps, 4),
        }
        final = f"{worker.folder}/final"
        run.measure_machine(steps)
        run.log(steps, seconds_per_step=result["seconds_per_step"])
        run.folder(final, "segmenter")
        if job.validation is not None:
            run.folder(f"{worker.folder}/best", "best")
        presence = fitted(published, checker, job, worker)
        run.log(steps, **presence)
        result |= presence
        run.keep("FINISHED")
        if job.validation is not None:
            result |= {"best_step": best["step"], "best_val_miou": round(best["miou"], 6)}
            chosen = build_segmenter(job).to(worker.device)
            chosen.load_state_dict(best["weights"])
            of_best = result | fitted(chosen, checker, job, worker)
            publish_best(job, chosen, of_best, f"{worker.folder}/best", run.run_id)
        with tempfile.TemporaryDirectory() as folder:
            published.save(folder, **job.origin, training=result, commit=tracking.commit(), run_id=run.run_id)
            checkpoints.publish(folder, final)
        run.flush(at_once=True)
        run.keep()


def objective(segmenter: Segmenter, episodic: Episodic, worker: training.Worker) -> EpisodeLoss:
    """The loss as one module, compiled if the settings ask for it.

    On one GPU, without accumulation, its passes are CUDA graphs: launching a step's many small kernels one by one takes
    longer than they do (docs/benchmarks/gpu.md).
    """
    loss = EpisodeLoss(segmenter)
    if episodic.train_compile:
        as_graphs = worker.device.type == "cuda" and worker.world == 1 and episodic.accumulate == 1
        loss.compile(mode="reduce-overhead" if as_graphs else "default")
    return loss


def moving_average(segmenter: Segmenter, decay: float) -> AveragedModel | None:
    """The exponential moving average of a segmenter's weights; None without a decay."""
    if not decay:
        return None
    return AveragedModel(segmenter, multi_avg_fn=get_ema_multi_avg_fn(decay))


def fed(loader: EpisodeLoader, job: EpisodicJob, worker: training.Worker, first: int) -> Iterator[EpisodeBatch]:
    """This worker's episodes from a step on, read ahead: each step's in as many parts as it accumulates."""
    settings, split = worker.settings, job.episodic.accumulate
    shares = training.worker_batches(first, job.steps, job.episodic.batch, worker.rank, worker.world)
    size = job.episodic.batch // (worker.world * split)
    indices = (share[at : at + size] for share in shares for at in range(0, len(share), size))
    return loader.batches(job.sampler, indices, settings.feed_threads, settings.feed_depth * split)


def train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    parts: Sequence[EpisodeBatch],
    worker: training.Worker,
    clip: float | None,
) -> dict[str, Tensor]:
    """One step on this worker's part, or parts, of the batch; returns their mean losses, not yet those of all workers.

    Whatever the split, the gradient is that of the whole batch: BCE is over its pixels, counted over all workers.
    """
    pixels = training.mean_over_ranks(torch.stack([part.scored_pixels() for part in parts]).mean().to(worker.device))
    optimiser.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        alone = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
            with worker.autocast():
                losses = model(part.to(worker.device), pixels)
            (losses["loss"] / len(parts)).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach().float() / len(parts)
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
    optimiser.step()
    return total


@torch.inference_mode()
def validate(segmenter: Segmenter, loader: EpisodeLoader, job: EpisodicJob, worker: training.Worker) -> float:
    """mIoU of the validation episodes, at the side of the loss."""
    assert job.validation is not None
    score, batch = FewShotScore(job.validation.by_class), job.episodic.batch // job.episodic.accumulate
    wanted = range(job.episodic.validation_episodes)
    chunks = (wanted[at : at + batch] for at in range(0, len(wanted), batch))
    segmenter.eval()
    for episodes in loader.batches(job.validation, chunks):
        with worker.autocast():
            logits = segment_batch(segmenter, episodes.to(worker.device)).mask_logits.float()
        assert episodes.query_labels is not None
        large = F.interpolate(logits, size=(job.label_px, job.label_px), mode="bilinear", align_corners=False)[:, 0] > 0
        for mask, label, episode in zip(large.cpu(), episodes.query_labels, episodes.episodes, strict=True):
            score.add(count(mask.numpy(), label.numpy(), boundary=False), episode.class_id)
    segmenter.train()
    return score.result()["miou"]


def fitted(segmenter: Segmenter, loader: EpisodeLoader, job: EpisodicJob, worker: training.Worker) -> dict[str, float]:
    """Fit the presence score, where the model has one, and say how well: on training episodes, half of whose queries
    lack the class."""
    if job.lacking is None:
        return {}
    count, size = job.episodic.presence_episodes, job.episodic.batch // job.episodic.accumulate
    first = job.steps * job.episodic.batch  # after those that trained
    episodes = presence_fit.episodes(job.sampler, job.lacking, first, count)
    segmenter.eval()
    with worker.autocast():
        present, absent = (
            presence_fit.seen(
                segmenter, loader.ahead(of[at : at + size] for at in range(0, count, size)), worker.device
            )
            for of in episodes
        )
    return presence_fit.fit(segmenter, present, absent)


def publish_best(job: EpisodicJob, best: Segmenter, result: dict[str, Any], url: str, run_id: str) -> None:
    """A checkpoint of the best weights, which says what chose them."""
    with tempfile.TemporaryDirectory() as folder:
        selected = {"on": job.episodic.select_on, "step": result["best_step"], "miou": result["best_val_miou"]}
        best.save(folder, **job.origin, training=result, selected=selected, commit=tracking.commit(), run_id=run_id)
        checkpoints.publish(folder, url)


@torch.inference_mode()
def draw_panel(
    segmenter: Segmenter, loader: EpisodeLoader, sampler: EpisodeSampler, device: torch.device
) -> Image.Image:
    """A few training episodes as pictures, always the same."""
    batch = loader.load([sampler.episode(i).plain() for i in range(PANEL_ROWS)]).to(device)
    return panels.episodes(loader.dataset, loader.view_seed, batch.episodes, segment_batch(segmenter, batch))
