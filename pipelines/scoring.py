"""Running test episodes and counting them: the work of `evaluate`."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from feature_store import FeatureStore
from fsdino import baselines
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.masks import binary_label
from fsdino.episodic import EpisodeBatch, segment_batch
from fsdino.metrics import FewShotScore
from fsdino.segmenter import Prediction, Segmenter
from pipelines import checkpoints, cluster, panels, tracking
from pipelines.loading import EpisodeLoader
from pipelines.recipes import Device
from pipelines.runs import ScoreFile, flat

BATCH = 8
PANEL_ROWS = 6
BASELINES = {
    "prototype": baselines.prototype_logits,
    "two-prototype": baselines.two_prototype_logits,
    "nearest": baselines.nearest_logits,
}


@dataclass(frozen=True)
class ScoringJob:
    """What is scored on what, checked and opened."""

    dataset: Dataset
    late: FeatureStore
    query: FeatureStore | None
    sampler: EpisodeSampler
    checkpoint: str
    method: str
    device: Device
    scores: ScoreFile
    res_px: int
    episodes: int
    tracking_uri: str
    panel: str
    masks: str


def score(job: ScoringJob, about: dict[str, Any]) -> dict[str, Any]:
    """`about` with `miou`, `fb_iou` in [0, 1] and `per_class` (class name to IoU), written, then logged with a
    picture."""
    device = cluster.device_of(job.device)
    if job.method == "segmenter":
        segmenter, _ = checkpoints.load_segmenter(job.checkpoint)
        method = trained(segmenter.to(device), cluster.autocast(job.device.train_precision, device))
    else:
        method = training_free(job.method)
    loader = EpisodeLoader(job.dataset, job.late, job.query, job.res_px)
    fold, names = job.sampler.fold, job.dataset.class_names
    if job.masks:
        Path(job.masks).mkdir(parents=True, exist_ok=True)
    opened = tracking.running(
        job.tracking_uri,
        "evaluate",
        f"fold{fold}-{job.scores.title}",
        flat(job.scores.identity),
        {"dataset": job.dataset.name},
        outbox=job.scores.outbox,
    )
    with opened as run, torch.inference_mode():
        total = score_episodes(method, loader, job, device).result()
        per_class = {names[c - 1]: round(iou, 6) for c, iou in total["per_class"].items()}
        result = {**about, "miou": total["miou"], "fb_iou": total["fb_iou"], "per_class": per_class}
        run.log(0, miou=total["miou"], fb_iou=total["fb_iou"], **{f"iou_{n}": v for n, v in per_class.items()})
        run.keep("FINISHED")
        job.scores.write(result)
        with tracking.optional(run, "the picture of episodes"):
            shown = loader.load([job.sampler.episode(i) for i in range(min(PANEL_ROWS, job.episodes))]).to(device)
            picture = panels.episodes(job.dataset, loader.view_seed, shown.episodes, method(shown))
            run.picture(picture, "panels/test.png")
            if job.panel:
                picture.save(job.panel)
    return result


def score_episodes(
    method: Callable[[EpisodeBatch], Prediction], loader: EpisodeLoader, job: ScoringJob, device: torch.device
) -> FewShotScore:
    """Run test episodes 0 ... episodes-1 in batches and count each at its label's own size."""
    total = FewShotScore(job.dataset.novel(job.sampler.fold))
    batches = (range(at, min(at + BATCH, job.episodes)) for at in range(0, job.episodes, BATCH))
    with tqdm(total=job.episodes, unit="episode", desc="evaluating", mininterval=5, file=sys.stderr) as bar:
        for batch in loader.batches(job.sampler, batches):
            logits = method(batch.to(device)).mask_logits
            for episode, one in zip(batch.episodes, logits, strict=True):
                label = binary_label(loader.dataset.label(episode.query), episode.class_id)
                mask = at_size(one, label.shape).cpu().numpy() > 0
                total.add(mask, label, episode.class_id)
                if job.masks:
                    name = f"{bar.n:05d}_{episode.class_id}_{episode.query.replace('/', '_')}.png"
                    Image.fromarray(mask.astype(np.uint8) * 255).save(Path(job.masks) / name)
                bar.update()
    return total


def at_size(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """One `1 m m` map, bilinear, at a photograph's (height, width)."""
    return F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]


def trained(segmenter: Segmenter, precision: AbstractContextManager) -> Callable[[EpisodeBatch], Prediction]:
    """The segmenter as a function of a batch."""

    def predicted(batch: EpisodeBatch) -> Prediction:
        with precision:
            return segment_batch(segmenter, batch)

    return predicted


def training_free(method: str) -> Callable[[EpisodeBatch], Prediction]:
    """A baseline as a function of a batch."""

    def predicted(batch: EpisodeBatch) -> Prediction:
        logits = BASELINES[method](batch.support_late, batch.support_masks, batch.query_late)
        return Prediction(prior_logits=None, mask_logits=logits)

    return predicted
