"""Score a checkpoint, or a method without training, on the classes its fold never saw: mIoU, FB-IoU, boundary IoU.

    python -m pipelines.evaluate --fold 1 --shots 1
    python -m pipelines.evaluate --fold 1 --seeds 10 --protocol hsnet --method prototype
    python -m pipelines.evaluate --fold 1 --absent                     # queries that do not show the class
    python -m pipelines.evaluate --data DAVIS --from-images --checkpoint CHECKPOINT --fold 0

Episodes follow the protocol, whose rules stand in the result. The last line of stdout has `dataset, protocol, rules,
folds, fold, shots, episodes, seeds, variant, miou, fb_iou, boundary_iou, per_class` (for videos `j`, `f`, `j_and_f`;
for absent objects `empty`); of several seeds the means, their `std`, and each seed's own. Every episode is a row of a
Parquet file beside the scores. Rerun, a finished evaluation just prints its result.
Cost: docs/benchmarks/evaluation.md.
"""

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from feature_store import FeatureStore, Fingerprint
from fsdino.config import SegmenterConfig
from fsdino.data.davis import DavisDataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.errors import UserError
from fsdino.weights import weights_digest
from pipelines import checkpoints, datasets, stores
from pipelines.checks import Few, Fold, Folder, Picture, Place, Range, Share, Weights
from pipelines.cli import main
from pipelines.networks import MethodPlan, ScoringPlan
from pipelines.recipes import Backbone, Benchmark, Device, Places, RecipeName, Teaching, Testing, model_run, model_title
from pipelines.runs import ScoreFile, identity

MEASURES = ("miou", "fb_iou", "boundary_iou", "empty", "false_area")
"""What is averaged over seeds."""


@dataclass(frozen=True)
class Settings:
    """Score a segmenter on the novel classes of a fold."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    model: SegmenterConfig
    benchmark: Benchmark
    device: Device
    testing: Testing
    fold: Fold
    """The fold to test: 0 to 3, or 0 where a data set has but one."""
    shots: Few = 1
    """Supports in an episode."""
    method: Literal["segmenter", "prototype", "two-prototype", "nearest", "matching", "peak"] = "segmenter"
    """A trained segmenter, or a method without training on the same features (docs/method.md)."""
    checkpoint: Place | None = None
    """Checkpoint folder, instead of that of train_episodic for this fold and the model's flags."""
    adapter_checkpoint: Place | None = None
    """Adapter whose embeddings the method peak prompts, instead of the data set's own."""
    decoder_weights: Weights | None = None
    """A local SAM checkpoint for the method peak, instead of the publisher's."""
    from_images: bool = False
    """Compute features from the images as they are needed, instead of reading stores."""
    absent: bool = False
    """Queries that do not show the class: how many masks are rightly empty."""
    tasks: Few = 1
    """Processes on the Ray cluster; 1: this one."""
    memory: Annotated[int, Range(0, 64)] = 0
    """In videos: number of earlier, confident frames that are supports beside the first."""
    memory_confidence: Share = 0.9
    """From which mean probability of its object a frame is confident."""
    panel: Picture | None = None
    """Also write the picture panel to this file."""
    masks: Folder | None = None
    """Also write each episode's predicted mask into this folder, as EPISODE_CLASS_QUERY.png."""


@dataclass(frozen=True)
class Subject:
    """What is scored, and on which features."""

    title: str
    plan: MethodPlan
    late: FeatureStore | None
    query: FeatureStore | None
    identity: dict[str, Any]
    trained_on: str | None


def job(settings: Settings) -> dict[str, Any]:
    """Check, run the episodes of every seed, score, log; what has been scored already is only reported."""
    places, testing = settings.places, settings.testing
    plan, title, decisive, about = planned(settings)
    folder = checkpoints.run_folder(places, plan.dataset.name, plan.method.backbone)
    results = []
    for seed in range(testing.test_seed, testing.test_seed + testing.seeds):
        scores = ScoreFile(f"{folder}/scores", title, decisive | {"test_seed": seed})
        result = None if settings.panel or settings.masks else scores.finished(places.tracking_uri)
        if result is None:
            from pipelines import evaluation

            run = evaluation.episodes if plan.sampler else evaluation.videos
            result = run(plan, seed, scores, {**about, "seed": seed})
        results.append(result)
    return over_seeds(results)


def planned(settings: Settings) -> tuple[ScoringPlan, str, dict[str, Any], dict[str, Any]]:
    """What is to be scored, checked and opened: the plan, the method's title, what makes two evaluations the same, and
    what a result says beside its scores."""
    places, testing = settings.places, settings.testing
    dataset = datasets.dataset_of(places)
    video = isinstance(dataset, DavisDataset)
    if video and (settings.absent or testing.seeds > 1 or settings.shots > 1 or settings.tasks > 1):
        raise UserError(
            "--absent, --seeds, --shots, --tasks: expected none of them for videos, whose support is the first frame"
        )
    rules = datasets.rules_of(settings.benchmark, dataset)
    subject = segmenter(settings, dataset.name) if settings.method == "segmenter" else baseline(settings, dataset.name)
    opened = [store for store in (subject.late, subject.query) if store is not None]
    images = datasets.images_of(dataset, rules, settings.fold, "val", settings.benchmark.pairs, opened)
    used, episodes = list(images.listed), testing.episodes or rules.episodes
    sampler = None
    if not video:
        sampler = EpisodeSampler(
            images.listed,
            shots=settings.shots,
            fold=settings.fold,
            seed=testing.test_seed,
            training=False,
            order=rules.order,
            pairs=images.pairs,
            repeats_supports=rules.repeats_supports,
            test_view=rules.test_view,
        )
    told = {
        "dataset": dataset.name,
        "protocol": rules.name,
        "rules": asdict(rules),
        "fold": settings.fold,
        "shots": settings.shots,
        "fusion": testing.fusion if settings.shots > 1 else None,
        "episodes": len(used) if video else episodes,
        "absent": settings.absent,
        "memory": [settings.memory, settings.memory_confidence] if settings.memory else None,
    }
    decisive = identity(
        **told,
        images=sampler.digest if sampler else dataset.list_digest("val"),
        labels=dataset.labels_digest("val", used),
        features=[store.content(used) for store in opened] or datasets.photographs_digest(dataset, used),
        precision=settings.device.train_precision,
        method=subject.title,
        **subject.identity,
    )
    plan = ScoringPlan(
        dataset=dataset,
        method=subject.plan,
        late=subject.late,
        query=subject.query,
        sampler=sampler,
        rules=rules,
        fold=settings.fold,
        episodes=episodes,
        device=settings.device,
        vote=testing.fusion == "vote",
        absent=settings.absent,
        tasks=settings.tasks,
        memory=settings.memory,
        memory_confidence=settings.memory_confidence,
        tracking_uri=places.tracking_uri,
        panel=settings.panel or "",
        masks=settings.masks or "",
    )
    about = {
        **told,
        "folds": f"{len(dataset.folds)} {dataset.folds.rule}",
        "variant": subject.title,
        "trained_on": subject.trained_on,
        "left_out": images.left_out,
    }
    return plan, subject.title, decisive, about


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result as it is; of several the mean of each measure, its standard deviation, and each seed's own."""
    if len(results) == 1:
        return results[0]
    names = [name for name in MEASURES if name in results[0]]
    values = {name: [result[name] for result in results] for name in names}
    seeds = [{"seed": result["seed"], **{name: result[name] for name in names}} for result in results]
    mean = {name: statistics.fmean(of) for name, of in values.items()}
    std = {name: statistics.stdev(of) for name, of in values.items()}
    kept = {key: value for key, value in results[0].items() if key not in ("seed", "per_class")}
    if "per_class" in results[0]:
        classes = {name for result in results for name in result["per_class"]}
        of_classes = {n: [r["per_class"][n] for r in results if n in r["per_class"]] for n in sorted(classes)}
        kept["per_class"] = {name: round(statistics.fmean(of), 6) for name, of in of_classes.items()}
    return {**kept, **mean, "std": std, "seeds": seeds}


def segmenter(settings: Settings, dataset: str) -> Subject:
    """A trained segmenter, and the features that it was trained on: embeddings, or `early` for a joint adapter.

    Raises UserError if the checkpoint was trained on other features, or for another fold.
    """
    places = settings.places
    folder = checkpoints.run_folder(places, dataset, settings.backbone)
    url = settings.checkpoint or f"{folder}/{model_run(settings.fold, settings.model, settings.recipe)}/final"
    record = checkpoints.read_record(url, "segmenter")
    if "late" not in record or "run" not in record:
        raise UserError(f"{url}: the checkpoint does not say what it was trained on; use one written by train_episodic")
    if record["dataset"] == dataset and record["fold"] != settings.fold:
        raise UserError(
            f"{url}: trained for fold {record['fold']}, so it has seen the classes of fold {settings.fold}; "
            f"evaluate it on fold {record['fold']}"
        )
    trained_on, backbone = Fingerprint.of_record(record["late"]), Backbone(**record["backbone"])
    late = query = None
    if settings.from_images:
        backbone = replace(backbone, encoder_weights=settings.backbone.encoder_weights or backbone.encoder_weights)
        check_encoder(backbone, trained_on.weights)
        fingerprint = stores.encoded_fingerprint(backbone, "late", backbone.res, trained_on.weights)
    else:
        late = stores.open_encoded(places, dataset, "late", settings.backbone, settings.backbone.res)
        fingerprint = late.fingerprint
        decisive = ("model", "weights", "layer", "norm", "res_px", "preprocessing")
        differing = trained_on.differences({key: getattr(fingerprint, key) for key in decisive})
        if differing:
            raise UserError(
                f"{url}: trained on other features than {late.url} ({'; '.join(differing)}); pass the --store or --res "
                "it was trained with"
            )
        if record["adapter"]["kind"] != "joint":
            query = stores.open_embedding(places, dataset, record["adapter"]["digest"], backbone, late)
        else:
            query = stores.open_encoded(places, dataset, "early", backbone, backbone.res)
            stores.check_weights(query, fingerprint.weights)
    return Subject(
        title=model_title(SegmenterConfig(**record["config"]), record["recipe"]) + selection(record),
        plan=MethodPlan("segmenter", url, backbone),
        late=late,
        query=query,
        identity={
            "late": asdict(fingerprint),
            "model": record["config"],
            "checkpoint": record["sha256"][:16],
            "trained": record["run"],
            "query": None if query is None else asdict(query.fingerprint),
        },
        trained_on=f"{record['dataset']}, fold {record['fold']}",
    )


def selection(record: dict[str, Any]) -> str:
    """What chose a checkpoint's weights, as part of its name; nothing for the last ones of a training."""
    return f"-best-on-{record['selected']['on']}" if "selected" in record else ""


def baseline(settings: Settings, dataset: str) -> Subject:
    """A method without training. Raises UserError if it lacks what it prompts."""
    places, backbone = settings.places, settings.backbone
    digest = weights_digest(backbone.encoder, backbone.encoder_weights)
    late = query = adapter = None
    if settings.from_images:
        fingerprint = stores.encoded_fingerprint(backbone, "late", backbone.res, digest)
    else:
        late = stores.open_encoded(places, dataset, "late", backbone, backbone.res)
        fingerprint = late.fingerprint
        if settings.method == "matching":
            stores.check_weights(late, digest)
    decoder = settings.model.sam_decoder if settings.method == "peak" else None
    if settings.method == "peak":
        if decoder is None:
            raise UserError(
                f"--method peak: expected a decoder that takes points, but recipe {settings.recipe} has none of SAM's; "
                "name one with --sam-decoder"
            )
        adapter = checkpoints.plan_adapter(
            places, dataset, backbone, settings.teaching, settings.model, digest, settings.adapter_checkpoint
        )
        if late is not None:
            query = stores.open_embedding(places, dataset, adapter.digest, backbone, late)
    return Subject(
        title=str(settings.method),
        plan=MethodPlan(settings.method, "", backbone, adapter, decoder, settings.decoder_weights),
        late=late,
        query=query,
        identity={
            "late": asdict(fingerprint),
            "model": None,
            "checkpoint": decoder and weights_digest(decoder, settings.decoder_weights),
            "trained": None,
            "query": adapter and adapter.digest,
        },
        trained_on=None,
    )


def check_encoder(backbone: Backbone, digest: str) -> None:
    """Raise UserError if the encoder's weights are not those of that digest."""
    here = weights_digest(backbone.encoder, backbone.encoder_weights)
    if here != digest:
        raise UserError(
            f"{backbone.encoder}: expected the weights {digest} that the checkpoint was trained on, got {here}; name "
            "the right file with --encoder-weights"
        )


if __name__ == "__main__":
    main(Settings, job)
