"""Score a checkpoint, or a training-free baseline, on the classes its fold never saw: stores in, mIoU and FB-IoU out.

    python -m pipelines.evaluate --fold 1 --shots 1
    python -m pipelines.evaluate --fold 1 --shots 1 --method prototype

Episodes follow the protocol and are scored at the label's own size. The last line of stdout has `dataset, protocol,
folds, fold, shots, episodes, seed, variant, miou, fb_iou, per_class`; rerun, a finished evaluation just prints it.
Cost: 1,000 episodes of the offline recipe took 36 s on two cores.
"""

from dataclasses import dataclass
from typing import Any, Literal

from feature_store import FeatureStore, Fingerprint
from fsdino.config import SegmenterConfig
from fsdino.data.dataset import open_dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.protocols import protocol_of
from fsdino.errors import UserError
from pipelines import checkpoints, stores
from pipelines.checks import Few, Fold, Folder, Picture, Place
from pipelines.cli import main
from pipelines.recipes import Backbone, Benchmark, Device, Places, RecipeName, Testing, model_run, model_title
from pipelines.runs import ScoreFile, identity


@dataclass(frozen=True)
class Settings:
    """Score a segmenter on the novel classes of a fold."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    model: SegmenterConfig
    benchmark: Benchmark
    device: Device
    testing: Testing
    fold: Fold
    """The fold to test: 0 to 3."""
    shots: Few = 1
    """Supports in an episode."""
    method: Literal["segmenter", "prototype", "two-prototype", "nearest"] = "segmenter"
    """A trained segmenter, or a baseline without training (fsdino/baselines.py) on the same features."""
    checkpoint: Place | None = None
    """Checkpoint folder, instead of that of train_episodic for this fold and the model's flags."""
    panel: Picture | None = None
    """Also write the picture panel to this file."""
    masks: Folder | None = None
    """Also write each episode's predicted mask into this folder, as EPISODE_CLASS_QUERY.png."""


def job(settings: Settings) -> dict[str, Any]:
    """Check, run the episodes, score, log; what has been scored already is only reported."""
    places, testing = settings.places, settings.testing
    protocol, dataset = protocol_of(settings.benchmark.protocol), open_dataset(places.data)
    listed = protocol.test_images(dataset, settings.fold)
    late = stores.open_encoded(places, dataset.name, "late", settings.backbone, settings.backbone.res)
    folder = checkpoints.run_folder(places, dataset.name, settings.backbone)
    url, query, title = "", None, str(settings.method)
    scored: dict[str, Any] = {"model": None, "checkpoint": None, "trained": None, "query": None}
    if settings.method == "segmenter":
        url = settings.checkpoint or f"{folder}/{model_run(settings.fold, settings.model, settings.recipe)}/final"
        record = checkpoints.read_record(url, "segmenter")
        query = open_query(settings, url, record, dataset.name, late)
        title = model_title(SegmenterConfig(**record["config"]), record["recipe"])
        scored = {
            "model": record["config"],
            "checkpoint": record["sha256"][:16],
            "trained": record["run"],
            "query": query.fingerprint,
        }
    sampler = EpisodeSampler(
        stores.without_quarantined(listed, (late, query)),
        shots=settings.shots,
        fold=settings.fold,
        seed=testing.test_seed,
        training=False,
    )
    stores.check_images(sampler.images, late, query)
    stores.check_sizes(dataset, "val", sampler.images, late)
    same = identity(
        dataset=dataset.name,
        protocol=protocol.name,
        rules=protocol,
        fold=settings.fold,
        images=sampler.digest,
        labels=dataset.labels_digest("val", sampler.images),
        features=[store.content(sampler.images) for store in (late, query) if store is not None],
        shots=settings.shots,
        episodes=testing.episodes,
        test_seed=testing.test_seed,
        precision=settings.device.train_precision,
        method=title,
        late=late.fingerprint,
        **scored,
    )
    scores = ScoreFile(f"{folder}/scores", title, same)
    result = None if settings.panel or settings.masks else scores.finished(places.tracking_uri)
    if result is None:
        from pipelines import scoring

        planned = scoring.ScoringJob(
            dataset=dataset,
            late=late,
            query=query,
            sampler=sampler,
            checkpoint=url,
            method=settings.method,
            device=settings.device,
            scores=scores,
            res_px=settings.backbone.res,
            episodes=testing.episodes,
            tracking_uri=places.tracking_uri,
            panel=settings.panel or "",
            masks=settings.masks or "",
        )
        about = {
            "dataset": dataset.name,
            "protocol": protocol.name,
            "folds": f"{dataset.num_folds} {dataset.fold_rule}",
            "fold": settings.fold,
            "shots": settings.shots,
            "episodes": testing.episodes,
            "seed": testing.test_seed,
            "variant": title,
        }
        result = scoring.score(planned, about)
    return result


def open_query(settings: Settings, url: str, record: dict[str, Any], dataset: str, late: FeatureStore) -> FeatureStore:
    """The embeddings (`early` for a joint adapter) that belong to a checkpoint.

    Raises UserError if the checkpoint was trained on other features, or for another fold.
    """
    if "late" not in record or "run" not in record:
        raise UserError(f"{url}: the checkpoint does not say what it was trained on; use one written by train_episodic")
    trained_on, backbone = Fingerprint.of_record(record["late"]), Backbone(**record["backbone"])
    decisive = ("model", "weights", "layer", "norm", "res_px", "preprocessing")
    differing = trained_on.differences({key: getattr(late.fingerprint, key) for key in decisive})
    if differing:
        raise UserError(
            f"{url}: trained on other features than {late.url} ({'; '.join(differing)}); pass the --store or --res it "
            "was trained with"
        )
    if record["dataset"] == dataset and record["fold"] != settings.fold:
        raise UserError(
            f"{url}: trained for fold {record['fold']}, so it has seen the classes of fold {settings.fold}; "
            f"evaluate it on fold {record['fold']}"
        )
    if record["adapter"]["kind"] != "joint":
        return stores.open_embedding(settings.places, dataset, record["adapter"]["digest"], backbone, late)
    early = stores.open_encoded(settings.places, dataset, "early", backbone, backbone.res)
    stores.check_weights(early, late.fingerprint.weights)
    return early


if __name__ == "__main__":
    main(Settings, job)
