"""The loop of episodic training in one worker: its share of every step's episodes."""

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import ray.train.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from feature_store import FeatureStore
from fsdino import paper
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.episodic import EpisodeLoss, segment_batch
from fsdino.metrics import FewShotScore, count
from fsdino.segmenter import Segmenter
from fsdino.state import sam_decoder_state
from pipelines import checkpoints, panels, tracking, training
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
    )
    checker = copy.copy(loader)  # it scores void as nothing, whatever the loss makes of it
    checker.void_is_background = False
    segmenter = build_segmenter(job).to(worker.device)
    model = ray.train.torch.prepare_model(EpisodeLoss(segmenter))
    groups = parameter_groups(segmenter, job.episodic)
    optimiser = torch.optim.AdamW(groups, weight_decay=paper.WEIGHT_DECAY, fused=True)
    run, steps = worker.run, job.steps

    first, seconds = 0, 0.0
    best: dict[str, Any] = {"miou": -1.0, "step": 0, "weights": {}}
    if (state := training.load_state()) is not None:
        segmenter.load_state_dict(state["segmenter"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds, best = state["step"], state["seconds"], state["best"]
    clock = training.Stopwatch(seconds)
    losses: dict[str, float] = {}
    indices = training.worker_batches(first, steps, job.episodic.batch, worker.rank, worker.world)
    for done, batch in enumerate(loader.batches(job.sampler, indices), start=first + 1):
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * training.poly(done - 1, steps)
        with worker.autocast():
            parts = model(batch.to(worker.device))
        losses = training.mean_over_ranks(parts)
        training.check_finite(done, losses)
        optimiser.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimiser.step()
        worker.report(f"train fold {job.sampler.fold}", done, steps)
        if run:
            run.log(done, **losses, lr=optimiser.param_groups[0]["lr"])
            if done % FLUSH_EVERY == 0:
                run.measure_machine(done)
                run.flush()
            if done % max(1, steps // PANELS) == 0:
                with tracking.optional(run, "the picture of training"):
                    picture = draw_panel(segmenter, loader, job.sampler, worker.device)
                    run.picture_of_step(picture, "training episodes", done)
        if job.validation is not None and (done % job.episodic.validate_every == 0 or done == steps):
            # Rank 0 decides for all: a difference in rounding must not let ranks resume from different weights.
            (miou,) = training.from_rank_0(lambda: (validate(segmenter, checker, job, worker),))
            if run:
                run.log(done, val_miou=miou)
            if miou > best["miou"]:
                weights = {key: value.detach().cpu().clone() for key, value in segmenter.state_dict().items()}
                best = {"miou": miou, "step": done, "weights": weights}
        if done % worker.checkpoint_every == 0 and done < steps:
            training.check_finite(done, losses, segmenter)
            if run:  # a checkpoint must not be ahead of the curves that lead to it
                run.checkpoint()
            kept = {"segmenter": segmenter.state_dict(), "optimiser": optimiser.state_dict(), "seconds": clock.total()}
            kept["best"] = best
            training.save_state(worker.rank, {"step": done, **losses}, step=done, **kept)
    training.check_finite(steps, losses, segmenter)
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
        run.keep("FINISHED")
        if job.validation is not None:
            result |= {"best_step": best["step"], "best_val_miou": round(best["miou"], 6)}
            publish_best(job, best["weights"], result, f"{worker.folder}/best", run.run_id)
        with tempfile.TemporaryDirectory() as folder:
            segmenter.save(folder, **job.origin, training=result, commit=tracking.commit(), run_id=run.run_id)
            checkpoints.publish(folder, final)
        run.flush(at_once=True)
        run.keep()


@torch.inference_mode()
def validate(segmenter: Segmenter, loader: EpisodeLoader, job: EpisodicJob, worker: training.Worker) -> float:
    """mIoU of the validation episodes, at the side of the loss."""
    assert job.validation is not None
    score, batch = FewShotScore(job.validation.by_class), job.episodic.batch
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


def publish_best(job: EpisodicJob, weights: dict[str, Tensor], result: dict[str, Any], url: str, run_id: str) -> None:
    """A checkpoint of the best weights, which says what chose them."""
    best = build_segmenter(job)
    best.load_state_dict(weights)
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
