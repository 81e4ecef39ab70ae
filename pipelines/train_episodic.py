"""Episodic training (Sec. 3.4.3): late and embedding stores in, a segmenter's checkpoint out.

    python -m pipelines.train_episodic --fold 1

Each step takes episodes that depend on (seed, fold, index) alone, reads their cached features, and trains everything
but encoder and adapter with Dice + BCE on prior and final mask. A killed run goes on from its last checkpoint.
Cost: the paper trains 100 epochs on one A6000; README has the offline recipe's time per step on two cores.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import ray.train.torch
import torch
from torch import Tensor, nn

from feature_store import FeatureStore
from fsdino.adapter import BottleneckAdapter
from fsdino.checkpoint import files as checkpoint_files
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from fsdino.losses import mask_loss
from fsdino.segmenter import Segmenter, SegmenterConfig
from fsdino.teacher import sam_decoder_state
from fsdino.weights import state_digest
from pipelines import panels, stages, tracking, training
from pipelines.cli import main
from pipelines.loading import EpisodeBatch, EpisodeLoader, predict
from pipelines.recipes import Computing, Encoding, Episodic, Model, Places, RecipeName, Workers

PANEL_ROWS = 4
SAM_PARTS = ("decoder.", "mask_downscaling.", "encoding.")


@dataclass(frozen=True)
class Settings:
    """Train a few-shot segmenter on the base classes of a fold."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    model: Model
    episodic: Episodic
    workers: Workers
    computing: Computing
    fold: int
    """The fold whose classes are kept for the test: 0 to 3."""
    name: str = ""
    """Name of the run and its folder; fold{FOLD}-{VARIANT} and what is left out, if empty."""


class EpisodeLoss(nn.Module):
    """The training objective as one module, so that DDP sees every gradient."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """`loss` (Eq. 8) and its parts `final`, and `prior` where the variant has one."""
        predicted = predict(self.segmenter, batch)
        losses = {"final": mask_loss(predicted.mask_logits, batch.query_labels)}
        if predicted.prior_logits is not None:
            losses["prior"] = mask_loss(predicted.prior_logits, batch.query_labels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def job(settings: Settings) -> dict[str, Any]:
    """Check stores, fold and adapter, then train on Ray Train; a finished run is only reported."""
    dataset = VocDataset(settings.places.data)
    if settings.episodic.steps is not None and settings.episodic.steps < 1:
        raise UserError(f"--steps {settings.episodic.steps}: expected at least 1")
    training.check_batch(settings.episodic.batch, settings.workers.workers)
    name = settings.name or f"fold{settings.fold}-{settings.model.title}"
    images = dataset.training_images(settings.fold, settings.episodic.keep_novel)
    late, query, adapter = open_inputs(settings, dataset.name)
    sampler = make_sampler(settings, stages.usable(images, late, query))
    steps = num_steps(settings, sampler)
    folder = f"{settings.places.out}/{dataset.name}"
    url = f"{folder}/{name}/final"
    print(f"{name}: {len(sampler.images)} base images, {steps} steps of {settings.episodic.batch}", file=sys.stderr)
    identity = training.identity_of(
        encoding=settings.encoding,
        model=settings.model,
        episodic=settings.episodic,
        fold=settings.fold,
        num_steps=steps,
        seed=settings.workers.seed,
        train_precision=settings.computing.train_precision,
        late=training.made_by(late.fingerprint),
        adapter_weights=state_digest(adapter),
        base_images=len(sampler.images),
    )
    tags = {
        "dataset": dataset.name,
        "store.late": str(asdict(late.fingerprint)),
        f"store.{query.fingerprint.feature}": str(asdict(query.fingerprint)),
    }
    config = {
        "settings": settings,
        "dataset": dataset,
        "folder": f"{folder}/{name}",
        "steps": steps,
        "adapter": adapter,
    }
    training.run(
        name=name,
        folder=folder,
        experiment="train",
        loop=loop,
        config=config,
        places=settings.places,
        workers=settings.workers,
        computing=settings.computing,
        identity=identity,
        tags=tags,
        result="segmenter",
    )
    with tempfile.TemporaryDirectory() as local:
        model, record = Segmenter.load(training.fetch(url, local, checkpoint_files("segmenter")))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "checkpoint": url,
        "fold": settings.fold,
        "variant": settings.model.variant,
        "steps": steps,
        "trained_parameters": trained,
        **record["training"],
    }


def make_sampler(settings: Settings, images: dict[str, list[int]]) -> EpisodeSampler:
    """Training episodes of the fold's base classes."""
    return EpisodeSampler(
        images,
        shots=settings.episodic.train_shots,
        fold=settings.fold,
        seed=settings.workers.seed,
        training=True,
        num_views=settings.encoding.num_views,
        balance=settings.episodic.balance,
        flip=settings.episodic.flip,
    )


def num_steps(settings: Settings, sampler: EpisodeSampler) -> int:
    """Steps as set, or as many as the epochs make."""
    if settings.episodic.steps is not None:
        return settings.episodic.steps
    return max(1, settings.episodic.epochs * len(sampler.images) // settings.episodic.batch)


def open_inputs(settings: Settings, dataset: str) -> tuple[FeatureStore, FeatureStore, BottleneckAdapter]:
    """The stores of `late` and of the queries' embeddings (or `early`, for a joint adapter), and the adapter."""
    places, model = settings.places, settings.model
    late = stages.open_store(places, dataset, "late", settings.encoding)
    same = {"weights": late.fingerprint.weights}
    early = stages.open_store(places, dataset, "early", settings.encoding, **same)
    adapter = training.load_adapter(places, dataset, model, early.fingerprint, settings.workers.seed)
    if model.adapter == "joint":
        return late, early, adapter
    return late, training.open_embedding(places, dataset, model, late, state_digest(adapter)), adapter


def build_segmenter(settings: Settings, late: FeatureStore, adapter: BottleneckAdapter) -> Segmenter:
    """A fresh segmenter around the adapter, its decoder from SAM's checkpoint if the recipe names one."""
    model = settings.model
    segmenter = Segmenter(
        SegmenterConfig(
            early_channels=adapter.reduce.in_channels,
            late_channels=late.fingerprint.channels,
            grid=late.fingerprint.grid,
            embedding_channels=adapter.widen.out_channels,
            variant=model.variant,
            contrast=model.contrast,
            refine=model.refine,
            semantic_prompt=model.semantic_prompt,
            joint_adapter=model.adapter == "joint",
            sam_extras=model.sam_decoder is not None,
        )
    )
    segmenter.adapter.load_state_dict(adapter.state_dict())
    if model.sam_decoder is not None:
        state = sam_decoder_state(model.sam_decoder, model.decoder_weights)
        missing, unknown = segmenter.load_state_dict(state, strict=False)
        assert not unknown and not any(key.startswith(SAM_PARTS) for key in missing)
    return segmenter


def parameter_groups(segmenter: Segmenter, settings: Settings) -> list[dict[str, Any]]:
    """Two learning rates: the decoder's, and that of all other trainable layers."""
    groups: dict[float, list[nn.Parameter]] = {settings.episodic.lr: [], settings.episodic.decoder_lr: []}
    for name, parameter in segmenter.named_parameters():
        if parameter.requires_grad:
            of_sam = name.startswith(SAM_PARTS)
            groups[settings.episodic.decoder_lr if of_sam else settings.episodic.lr].append(parameter)
    return [{"params": parameters, "lr": lr, "initial_lr": lr} for lr, parameters in groups.items()]


def loop(config: dict[str, Any]) -> None:
    """One worker: its share of every step's episodes."""
    settings: Settings = config["settings"]
    dataset, steps = config["dataset"], config["steps"]
    device, rank, world = training.set_up(config)
    late, query, adapter = (*open_inputs(settings, dataset.name)[:2], config["adapter"])
    images = dataset.training_images(settings.fold, settings.episodic.keep_novel)
    sampler = make_sampler(settings, stages.usable(images, late, query))
    loader = EpisodeLoader(dataset, late, query, settings.episodic.label_px or settings.encoding.res)
    segmenter = build_segmenter(settings, late, adapter).to(device)
    model = ray.train.torch.prepare_model(EpisodeLoss(segmenter))
    optimiser = torch.optim.AdamW(parameter_groups(segmenter, settings), weight_decay=training.paper.WEIGHT_DECAY)
    run = tracking.Run(config["tracking_uri"], config["run_id"]) if rank == 0 else None

    first, seconds = 0, 0.0
    if (state := training.load_state()) is not None:
        segmenter.load_state_dict(state["segmenter"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds = state["step"], state["seconds"]
    clock = training.Stopwatch(seconds)
    losses: dict[str, float] = {}
    indices = training.worker_batches(first, steps, settings.episodic.batch, rank, world)
    for done, batch in enumerate(loader.batches(sampler, indices), start=first + 1):
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * training.poly(done - 1, steps)
        with training.autocast(settings.computing, device):
            parts = model(batch.to(device))
        optimiser.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimiser.step()
        losses = {key: value.item() for key, value in parts.items()}
        if run:
            config["progress"].tell.remote(f"train fold {settings.fold}", done, steps)
            run.log(done, **losses, lr=optimiser.param_groups[0]["lr"])
            if done % 50 == 0:
                run.flush()
        if done % settings.workers.checkpoint_every == 0 and done < steps:
            if run:  # a checkpoint must not be ahead of the curves that lead to it
                run.flush()
            kept = {"segmenter": segmenter.state_dict(), "optimiser": optimiser.state_dict(), "seconds": clock.total()}
            training.save_state(rank, {"step": done, **losses}, step=done, **kept)
    if run:
        seconds = clock.total()
        result = {
            "loss": losses.get("loss"),
            "seconds": round(seconds, 1),
            "seconds_per_step": round(seconds / steps, 4),
        }
        run.picture(draw_panel(segmenter, loader, sampler, device), "panels/training.png")
        with tempfile.TemporaryDirectory() as folder:
            origin = {"encoder": asdict(settings.encoding), "late": asdict(late.fingerprint), "fold": settings.fold}
            segmenter.save(folder, **origin, training=result, dataset=dataset.name, commit=tracking.commit())
            run.folder(folder, "segmenter")
            run.log(steps, seconds_per_step=result["seconds_per_step"])
            run.flush()
            training.publish(folder, f"{config['folder']}/final")  # last: it says that all is done


@torch.inference_mode()
def draw_panel(segmenter: Segmenter, loader: EpisodeLoader, sampler: EpisodeSampler, device: torch.device):
    """A few training episodes as pictures."""
    batch = loader.load([sampler.episode(i).plain() for i in range(PANEL_ROWS)]).to(device)
    return panels.episodes(loader.dataset, loader.view_seed, batch.episodes, predict(segmenter, batch))


if __name__ == "__main__":
    main(Settings, job)
