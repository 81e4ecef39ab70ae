"""Episodic training (Sec. 3.4.3): late and embedding stores in, a segmenter's checkpoint out.

    python -m pipelines.train_episodic --fold 1
    python -m pipelines.train_episodic --fold all     # each fold
    python -m pipelines.train_episodic --fold none    # a model of all classes

Each step takes episodes that depend on (seed, fold, index) alone, reads their cached features, and trains everything
but encoder and adapter with Dice + BCE on prior and final mask. A killed run resumes from its last checkpoint.
Cost: the paper trains 100 epochs on one A6000; docs/benchmarks/training.md has the time per step.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store import FeatureStore
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.data.dataset import Dataset, Split
from fsdino.data.episodes import NO_FOLD, EpisodeSampler
from fsdino.data.protocols import Protocol
from fsdino.data.views import PLAIN
from fsdino.errors import UserError
from fsdino.specs import encoder_spec
from fsdino.weights import weights_digest
from pipelines import checkpoints, datasets, stores
from pipelines.checks import FoldsToTrain, Place, Weights, check_batch
from pipelines.cli import main
from pipelines.recipes import (
    RECIPES,
    Backbone,
    Benchmark,
    Device,
    Episodic,
    Places,
    RecipeName,
    Teaching,
    Workers,
    departures,
    fold_title,
    model_run,
)
from pipelines.runs import RunFolder, identity

if TYPE_CHECKING:
    from pipelines.episodic_loop import EpisodicJob


@dataclass(frozen=True)
class Settings:
    """Train a few-shot segmenter on the base classes of a fold, or on all classes."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    model: SegmenterConfig
    benchmark: Benchmark
    episodic: Episodic
    workers: Workers
    device: Device
    fold: FoldsToTrain
    """The fold whose classes are kept for the test, 0 to 3; all: each of them, at once where the cluster has room;
    none: a model of all classes, to be used or to be tested on another data set."""
    name: str = ""
    """Name of the run and its folder; if empty, fold{FOLD}-{VARIANT}, or all-classes-{VARIANT}, and whatever flags
    changed in the recipe."""
    adapter_checkpoint: Place | None = None
    """Folder, path or URL, of an adapter, instead of the one that was distilled on this data set."""
    decoder_weights: Weights | None = None
    """A local SAM checkpoint for the decoder instead of the publisher's."""
    register: bool = True
    """Register the trained model in MLflow, from where it can be loaded and served (pipelines/registry.py)."""
    model_name: str = ""
    """Name under which MLflow registers the model; if empty, fsdino-DATASET-fold{FOLD}, or -all-classes. With all
    folds, -fold{FOLD} is added."""


NOT_OF_MODELS = re.compile(r"""[/:.%"']""")
"""What MLflow takes in no model's name."""
NAME_BYTES = 180
"""Of a run's name: file systems take 255, and the files of its scores add to it."""
Plan = tuple[RunFolder, "Callable[[], EpisodicJob]"]
"""A run, and what reads the first weights and makes its job."""


def job(settings: Settings) -> dict[str, Any]:
    """Check switches, stores, fold and adapter, then train on Ray Train; a finished run just prints its result."""
    if NOT_OF_MODELS.search(settings.model_name):
        raise UserError(f"--model-name {settings.model_name}: expected a name without / : . % and quotes")
    if "/" in settings.name or settings.name in (".", "..", "scores"):
        raise UserError(f"--name {settings.name}: expected the name of a folder of its own, without /")
    name = settings.name or title(settings, settings.fold if isinstance(settings.fold, int) else None)
    if len(name.encode()) > NAME_BYTES:
        raise UserError(f"{name}: expected a run's name of at most {NAME_BYTES} bytes; choose one with --name")
    settings.model.check()
    if settings.fold == "all":
        from pipelines import all_folds

        return all_folds.train(settings, range(len(datasets.dataset_of(settings.places).folds)))
    fold = None if settings.fold == "none" else settings.fold
    plan = planned(settings, fold)
    return result_of(settings, fold, plan[0], trained(settings, plan))


def trained(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Train what is planned, if it is not finished. The published checkpoint's record."""
    run, job_of_run = plan
    record = run.finished(settings.places.tracking_uri)
    if record is None:
        images, steps = run.identity["base_images"], run.identity["steps"]
        print(f"{run.name}: {images} base images, {steps} steps of {settings.episodic.batch}", file=sys.stderr)
        from pipelines import episodic_loop, training

        training.train(run, episodic_loop.loop, job_of_run(), settings.places, settings.workers, settings.device)
        record = checkpoints.read_record(run.final, "segmenter")
    return record


def result_of(settings: Settings, fold: int | None, run: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """What the command prints of a trained fold, whose model is registered first."""
    return {
        "checkpoint": run.final,
        "fold": fold,
        "variant": settings.model.variant,
        "steps": run.identity["steps"],
        **record["training"],
        "model": registered(settings, fold, run, record),
        **({} if settings.episodic.select_on == "none" else {"best": f"{run.url}/best"}),
    }


def planned(settings: Settings, fold: int | None) -> Plan:
    """What is to be trained, checked and opened."""
    places, backbone, model, episodic = settings.places, settings.backbone, settings.model, settings.episodic
    check_batch(episodic.batch, settings.workers.workers, episodic.accumulate)
    dataset = datasets.dataset_of(places)
    rules = datasets.rules_of(settings.benchmark, dataset)
    held_out = held_out_classes(settings, fold, dataset)
    listed = datasets.listing(dataset, rules, fold, "train", settings.benchmark.pairs, held_out)
    late = stores.open_encoded(places, dataset.name, "late", backbone, backbone.res)
    early = None
    if model.adapter == "joint":
        early = stores.open_encoded(places, dataset.name, "early", backbone, backbone.res)
        stores.check_weights(early, late.fingerprint.weights)
    adapter = checkpoints.plan_adapter(
        places,
        dataset.name,
        backbone,
        settings.teaching,
        model,
        late.fingerprint.weights,
        settings.adapter_checkpoint,
        settings.workers.seed,
    )
    query = early
    if query is None:
        query = stores.open_embedding(places, dataset.name, adapter.digest, backbone, late)
    images = datasets.usable(dataset, rules, fold, "train", listed, (late, query))
    sampler = datasets.sampler_of(
        images,
        rules,
        shots=episodic.train_shots,
        fold=fold,
        seed=settings.workers.seed,
        training=True,
        num_views=backbone.num_views,
        balance=episodic.balance,
        flip=episodic.flip,
    )
    lacking = None
    if episodic.absent_share or model.presence:
        lacking = sampler.lacking(dataset.class_pixels("train"))
    if episodic.absent_share and lacking is not None:
        sampler = sampler.with_absent(episodic.absent_share, lacking)
    validation = validation_sampler(settings, fold, dataset, rules, (late, query), held_out)
    steps = episodic.steps or max(1, episodic.epochs * len(sampler) // episodic.batch)
    shape = SegmenterShape(
        adapter.in_channels,
        late.fingerprint.channels,
        late.fingerprint.grid,
        adapter.out_channels,
        encoder_spec(backbone.encoder).late.groups,
    )
    origin: dict[str, Any] = {
        "recipe": settings.recipe,
        "dataset": dataset.name,
        "protocol": rules.name,
        "fold": fold,
        "base_images": len(sampler.images),
        "held_out_classes": [dataset.class_names[c - 1] for c in held_out],
        "training_list": dataset.list_digest("train"),
        "backbone": asdict(backbone),
        "late": asdict(late.fingerprint),
        "adapter": {"kind": adapter.kind, "digest": adapter.digest},
        "episodic": decisive(episodic),
        "seed": settings.workers.seed,
        "train_precision": settings.device.train_precision,
    }
    same = identity(
        model=model.record(),
        steps=steps,
        rules=rules.of_training(),
        images=sampler.digest,
        validation=validation and validation.digest,
        labels=dataset.labels_digest("train", sampler.images),
        features=[store.content(sampler.images) for store in (late, query)],
        query=query.fingerprint,
        decoder=model.sam_decoder and weights_digest(model.sam_decoder, settings.decoder_weights),
        **origin,
    )
    run = RunFolder(
        folder=checkpoints.run_folder(places, dataset.name, backbone),
        name=_of_fold(settings, settings.name, fold) or title(settings, fold),
        pipeline="train",
        dataset=dataset.name,
        checkpoint="segmenter",
        identity=same,
        idle=idle(episodic),
        inputs=(datasets.data_input(dataset, "train", images.listed), *stores.inputs((late, query), "training")),
    )

    def job_of_run() -> "EpisodicJob":
        from pipelines import episodic_loop

        adapter_state, decoder_state = episodic_loop.initial_weights(adapter, model, settings.decoder_weights)
        return episodic_loop.EpisodicJob(
            dataset=dataset,
            late=late,
            query=query,
            sampler=sampler,
            model=model,
            shape=shape,
            episodic=episodic,
            steps=steps,
            label_px=episodic.label_px or backbone.res,
            void_is_background=rules.void_in_training == "background",
            validation=validation,
            lacking=lacking if model.presence else None,
            origin={**origin, "run": same},
            adapter=adapter_state,
            decoder=decoder_state,
        )

    return run, job_of_run


def registered(settings: Settings, fold: int | None, run: RunFolder, record: dict[str, Any]) -> str | None:
    """The version of the registered model that the run became, NAME/VERSION; unless --no-register, it is made first."""
    begun = run.begun()
    assert begun is not None
    known = begun["registered"]
    own = _of_fold(settings, settings.model_name, fold)
    name = own or (known or f"fsdino-{NOT_OF_MODELS.sub('-', run.dataset)}-{fold_title(fold)}").split("/")[0]
    if settings.register and (known is None or known.split("/")[0] != name):
        from pipelines import registry

        uri = settings.places.tracking_uri
        known = registry.register(uri, begun["run_id"], run.final, record, name, run.dataset) or known
        run.write(begun["run_id"], begun["closed"], known)
    return known


def _of_fold(settings: Settings, name: str, fold: int | None) -> str:
    """A name of one's own, for one of several folds."""
    return f"{name}-{fold_title(fold)}" if name and settings.fold == "all" else name


def decisive(episodic: Episodic) -> dict[str, Any]:
    """The settings that make another model: not how a step is computed, nor a switch of a later release that is off."""
    off = {"accumulate", "train_compile"}
    off |= {
        name
        for name, value in (("clip", None), ("ema", 0.0), ("absent_share", 0.0), ("presence_episodes", 512))
        if getattr(episodic, name) == value
    }
    return {name: value for name, value in asdict(episodic).items() if name not in off}


def idle(episodic: Episodic) -> frozenset[str]:
    """Settings without effect: epochs where steps are given, how to validate where nothing does."""
    names = {"epochs"} if episodic.steps is not None else {"steps"}
    if episodic.select_on == "none":
        names |= {"validation_classes", "validate_every", "validation_episodes"}
    return frozenset(f"episodic.{name}" for name in names)


def held_out_classes(settings: Settings, fold: int | None, dataset: Dataset) -> list[int]:
    """Base classes that validate. Raises UserError if no others would be left to train."""
    if settings.episodic.select_on != "base":
        return []
    base, wanted = dataset.folds.base(fold), settings.episodic.validation_classes
    if wanted >= len(base):
        raise UserError(f"--validation-classes {wanted}: expected fewer than the {len(base)} base classes")
    drawn = np.random.default_rng([settings.workers.seed, NO_FOLD if fold is None else fold]).choice(
        base, wanted, replace=False
    )
    return sorted(int(class_id) for class_id in drawn)


def validation_sampler(
    settings: Settings,
    fold: int | None,
    dataset: Dataset,
    rules: Protocol,
    opened: Sequence[FeatureStore],
    held_out: Sequence[int],
) -> EpisodeSampler | None:
    """Episodes that choose the best weights: of base classes that are held out, or of the novel ones."""
    on = settings.episodic.select_on
    if on == "none":
        return None
    if fold is None and on == "novel":
        raise UserError("--select-on novel: --fold none keeps no class for the test; use base or none")
    split: Split = "train" if on == "base" else "val"
    pairs = settings.benchmark.pairs
    listed = datasets.listing(dataset, rules, fold, split, pairs, held_out, validating=on == "base")
    images = datasets.usable(dataset, rules, fold, split, listed, opened)
    return datasets.sampler_of(
        images,
        rules,
        shots=settings.episodic.train_shots,
        fold=fold,
        seed=settings.workers.seed,
        training=False,
        test_view=rules.test_view if on == "novel" else PLAIN,
    )


def title(settings: Settings, fold: int | None) -> str:
    """The run's name: fold, model, and what else flags changed in the recipe."""
    recipe = RECIPES[settings.recipe]()
    # How a test is scored makes no other model.
    of_training = replace(settings.benchmark, scored_at=None, align_corners=None, scores_void=None)
    words = departures(settings.teaching, recipe.teaching)
    words += departures(of_training, recipe.benchmark)
    words += departures(replace(settings.episodic, accumulate=1, train_compile=False), recipe.episodic)
    of_folder = ("encoder-", "res-")  # they are in the run folder's name
    words += [w for w in departures(settings.backbone, recipe.backbone) if not w.startswith(of_folder)]
    if settings.workers.seed != recipe.workers.seed:
        words.append(f"seed-{settings.workers.seed}")
    if settings.device.train_precision != recipe.device.train_precision:
        words.append(settings.device.train_precision)
    return "-".join([model_run(fold, settings.model, settings.recipe), *words]).replace("/", "-")


if __name__ == "__main__":
    main(Settings, job)
