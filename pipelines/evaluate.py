"""Score a checkpoint, or a training-free baseline, on the classes its fold never saw: stores in, mIoU and FB-IoU out.

    python -m pipelines.evaluate --fold 1 --shots 1
    python -m pipelines.evaluate --fold 1 --shots 1 --method prototype

Episodes follow the `pfenet` protocol and are scored at the label's own size. The last line of stdout has `dataset,
protocol, fold, shots, episodes, seed, variant, miou, fb_iou, per_class`.
Cost: 1,000 episodes of the offline recipe took 36 s on two cores.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from feature_store import FeatureStore
from fsdino import baselines
from fsdino.checkpoint import files as checkpoint_files
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.voc import VocDataset, binary_label
from fsdino.errors import UserError
from fsdino.metrics import FewShotScore
from fsdino.segmenter import Prediction, Segmenter
from fsdino.weights import state_digest
from pipelines import panels, stages, tracking, training
from pipelines.cli import main
from pipelines.loading import EpisodeBatch, EpisodeLoader, predict
from pipelines.recipes import Computing, Encoding, Model, Places, RecipeName, Testing

BATCH = 8
PANEL_ROWS = 6


@dataclass(frozen=True)
class Settings:
    """Score a segmenter on the novel classes of a fold."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    model: Model
    computing: Computing
    testing: Testing
    fold: int
    """The fold to test: 0 to 3."""
    shots: int = 1
    """Supports in an episode."""
    method: Literal["segmenter", "prototype", "contrast", "nearest"] = "segmenter"
    """The trained segmenter of --variant, or a baseline without training (fsdino/baselines.py) on the same features."""
    checkpoint: str = ""
    """Checkpoint folder; that of train_episodic for this fold and variant if empty."""
    panel: str = ""
    """Also write the picture panel to this file."""


def job(settings: Settings) -> dict[str, Any]:
    """Check, run the episodes, score, log."""
    dataset, places = VocDataset(settings.places.data), settings.places
    model, title = None, str(settings.method)
    images = dataset.test_images(settings.fold)
    late = stages.open_store(places, dataset.name, "late", settings.encoding)
    device = stages.device_of(settings.computing)
    query = None
    if settings.method == "segmenter":
        segmenter, title, query = open_segmenter(settings, dataset.name, late)
        model = segmenter.config
        method = trained(segmenter.to(device), training.autocast(settings.computing, device))
    else:
        method = training_free(settings.method)
    sampler = EpisodeSampler(
        stages.usable(images, late, query),
        shots=settings.shots,
        fold=settings.fold,
        seed=settings.testing.test_seed,
        training=False,
    )
    loader = EpisodeLoader(dataset, late, query, settings.encoding.res)
    identity = training.identity_of(testing=settings.testing, model=model, encoding=settings.encoding)
    identity |= {"fold": settings.fold, "shots": settings.shots, "method": title, "protocol": dataset.protocol}
    tags = {"dataset": dataset.name, "store.late": str(asdict(late.fingerprint))}
    with tracking.running(places.tracking_uri, "evaluate", f"fold{settings.fold}-{title}", identity, tags) as run:
        score = score_episodes(method, loader, sampler, settings.testing.episodes, device, dataset.novel(settings.fold))
        result = score.result()
        shown = loader.load([sampler.episode(i) for i in range(min(PANEL_ROWS, settings.testing.episodes))]).to(device)
        with torch.inference_mode():
            picture = panels.episodes(dataset, loader.view_seed, shown.episodes, method(shown))
        run.picture(picture, "panels/test.png")
        if settings.panel:
            picture.save(settings.panel)
        per_class = {dataset.class_names[c - 1]: round(iou, 6) for c, iou in result["per_class"].items()}
        run.log(0, miou=result["miou"], fb_iou=result["fb_iou"], **{f"iou_{n}": v for n, v in per_class.items()})
    return {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
        "fold": settings.fold,
        "shots": settings.shots,
        "episodes": settings.testing.episodes,
        "seed": settings.testing.test_seed,
        "variant": title,
        "miou": result["miou"],
        "fb_iou": result["fb_iou"],
        "per_class": per_class,
    }


def open_segmenter(settings: Settings, dataset: str, late: FeatureStore) -> tuple[Segmenter, str, FeatureStore]:
    """The checkpoint, its title, and the store of embeddings (`early` for a joint adapter) that belongs to it.

    Raises UserError if the checkpoint was trained on features of other weights, or for another fold.
    """
    places = settings.places
    url = settings.checkpoint or f"{places.out}/{dataset}/fold{settings.fold}-{settings.model.title}/final"
    with tempfile.TemporaryDirectory() as folder:
        segmenter, record = Segmenter.load(training.fetch(url, folder, checkpoint_files("segmenter")))
    if "late" not in record:
        raise UserError(f"{url}: the checkpoint does not say what it was trained on; take one of train_episodic")
    made_on = record["late"]
    expected = what(asdict(late.fingerprint))
    if what(made_on) != expected:
        raise UserError(f"{url}: expected a checkpoint for {expected}, got one for {what(made_on)}; name its own store")
    if record["dataset"] == dataset and record["fold"] != settings.fold:
        raise UserError(
            f"{url}: trained for fold {record['fold']}, so it knows the classes of fold {settings.fold}; test its own"
        )
    config, adapter = segmenter.config, settings.model.adapter
    model = replace(
        settings.model,
        variant=config.variant,
        semantic_prompt=config.semantic_prompt,
        adapter="joint" if config.joint_adapter else "distilled" if adapter == "joint" else adapter,
    )
    if config.joint_adapter:
        weights = late.fingerprint.weights
        query = stages.open_store(places, dataset, "early", settings.encoding, weights=weights)
    else:
        query = training.open_embedding(places, dataset, model, late, state_digest(segmenter.adapter))
    return segmenter, model.title, query


def what(late: dict[str, Any]) -> str:
    """What a segmenter was trained on, from the record of its `late` features."""
    layer = training.layer(late["layers"], "late")
    return f"{late['model']} at {late['res_px']} px ({late['weights']}, {layer})"


@torch.inference_mode()
def score_episodes(
    method: Callable[[EpisodeBatch], Prediction],
    loader: EpisodeLoader,
    sampler: EpisodeSampler,
    episodes: int,
    device: torch.device,
    classes: list[int],
) -> FewShotScore:
    """Run test episodes 0 ... episodes-1 in batches and count each at its label's own size."""
    score = FewShotScore(classes)
    batches = (range(at, min(at + BATCH, episodes)) for at in range(0, episodes, BATCH))
    with tqdm(total=episodes, unit="episode", desc="evaluating", mininterval=5, file=sys.stderr) as bar:
        for batch in loader.batches(sampler, batches):
            logits = method(batch.to(device)).mask_logits
            for episode, one in zip(batch.episodes, logits, strict=True):
                label = binary_label(loader.dataset.label(episode.query), episode.class_id)
                score.add(at_size(one, label.shape).cpu().numpy() > 0, label, episode.class_id)
            bar.update(len(batch.episodes))
    return score


def at_size(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """One `1 m m` map, bilinear, at a photograph's (height, width)."""
    return F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]


def trained(segmenter: Segmenter, precision: AbstractContextManager) -> Callable[[EpisodeBatch], Prediction]:
    """The segmenter as a function of a batch."""

    def predicted(batch: EpisodeBatch) -> Prediction:
        with precision:
            return predict(segmenter, batch)

    return predicted


def training_free(method: str) -> Callable[[EpisodeBatch], Prediction]:
    """A baseline as a function of a batch."""
    logits = {
        "prototype": baselines.prototype_logits,
        "contrast": baselines.contrast_logits,
        "nearest": baselines.nearest_logits,
    }[method]

    def predicted(batch: EpisodeBatch) -> Prediction:
        found = logits(batch.support_late, batch.support_masks, batch.query_late)
        return Prediction(prior_logits=None, mask_logits=found)

    return predicted


if __name__ == "__main__":
    main(Settings, job)
