"""Score a checkpoint, or a method without training, on the classes its fold never saw: mIoU, FB-IoU, boundary IoU.

    python -m pipelines.evaluate --fold 1 --shots 1
    python -m pipelines.evaluate --fold 1 --seeds 10 --protocol hsnet --method prototype
    python -m pipelines.evaluate --fold 1 --absent                     # queries that do not show the class
    python -m pipelines.evaluate --fold 1 --ways 5                     # all classes of the fold at once
    python -m pipelines.evaluate --data DAVIS --dataset davis2017 --from-images --checkpoint CHECKPOINT --fold 0

Episodes follow the protocol, whose rules stand in the result. The last line of stdout has `dataset, protocol, rules,
folds, fold, shots, episodes, seeds, variant, miou, fb_iou, boundary_iou, per_class` (for videos `j`, `f`, `j_and_f`;
for absent objects `empty`); of several seeds the means, their `std`, and each seed's own. Every episode is a row of a
Parquet file beside the scores. Rerun, a finished evaluation just prints its result.
Cost: docs/benchmarks/evaluation.md.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fsdino.config import SegmenterConfig
from fsdino.data.davis import DavisDataset
from fsdino.errors import UserError
from pipelines import checkpoints, datasets, stores, subjects
from pipelines.checks import Cores, Few, Fold, Folder, Picture, Place, Range, Share, Weights
from pipelines.cli import main
from pipelines.recipes import Backbone, Benchmark, Device, Places, RecipeName, Teaching, Testing
from pipelines.runs import ScoreFile, identity
from pipelines.scoring_plan import ScoringPlan

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
    ways: Annotated[int, Range(1, 64)] = 1
    """Classes at once: the query's and others of the fold, each with supports; a pixel goes to the one with the largest
    logit, or to none."""
    method: Literal["segmenter", "prototype", "two-prototype", "nearest", "matching", "peak"] = "segmenter"
    """A trained segmenter, or a method without training on the same features (docs/data.md)."""
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
    keep_masks: bool = False
    """Score masks also of classes that the query does not seem to show, which are else left empty."""
    tasks: Few = 1
    """Processes on the Ray cluster; 1: this one."""
    task_cpus: Cores = 1
    """CPU cores per process."""
    memory: Annotated[int, Range(0, 64)] = 0
    """In videos: number of earlier, confident frames that are supports beside the first."""
    memory_confidence: Share = 0.9
    """From which mean probability of its object a frame is confident."""
    panel: Picture | None = None
    """Also write the picture panel to this file."""
    masks: Folder | None = None
    """Also write each episode's predicted mask into this folder, as EPISODE_CLASS_QUERY.png."""


def job(settings: Settings) -> dict[str, Any]:
    """Check, run the episodes of every seed, score, log; what is scored already just prints its result."""
    places, testing = settings.places, settings.testing
    plan, title, decisive, about = planned(settings)
    folder = checkpoints.run_folder(places, plan.dataset.name, plan.method.backbone)
    seeds = list(range(testing.test_seed, testing.test_seed + testing.seeds))
    summary = ScoreFile(f"{folder}/scores", title, decisive | {"test_seed": seeds})

    def scored(seed: int, parent: str | None) -> dict[str, Any]:
        scores = ScoreFile(f"{folder}/scores", title, decisive | {"test_seed": seed})
        result = None if settings.panel or settings.masks else scores.finished(places.tracking_uri)
        if result is None:
            from pipelines import evaluation

            run = evaluation.episodes if plan.sampler else evaluation.videos
            result = run(plan, seed, scores, {**about, "seed": seed}, parent)
        return result

    try:
        if len(seeds) == 1:
            return scored(seeds[0], None)
        result = summary.finished(places.tracking_uri)
        if result is None:
            from pipelines import evaluation

            with evaluation.summary(plan, summary) as run:
                result = over_seeds([scored(seed, run.run_id) for seed in seeds])
                evaluation.summarise(run, summary, result)
        return result
    finally:
        if "pipelines.scoring" in sys.modules:
            sys.modules["pipelines.scoring"].drop_scorers()


def planned(settings: Settings) -> tuple[ScoringPlan, str, dict[str, Any], dict[str, Any]]:
    """What is to be scored, checked and opened: the plan, the method's title, what makes two evaluations the same, and
    what a result says beside its scores."""
    places, testing = settings.places, settings.testing
    dataset = datasets.dataset_of(places)
    video = isinstance(dataset, DavisDataset)
    check_flags(settings, video)
    rules = datasets.rules_of(settings.benchmark, dataset)
    listed = datasets.listing(dataset, rules, settings.fold, "val", settings.benchmark.pairs)
    subject = subjects.subject(settings, dataset.name)
    opened = [store for store in (subject.late, subject.query) if store is not None]
    images = datasets.usable(dataset, rules, settings.fold, "val", listed, opened)
    used, sampler, lacking = list(images.listed), None, None
    if not video:
        sampler = datasets.sampler_of(
            images,
            rules,
            shots=settings.shots,
            fold=settings.fold,
            seed=testing.test_seed,
            training=False,
            test_view=rules.test_view,
        )
        if settings.ways > len(sampler.by_class):
            raise UserError(f"--ways {settings.ways}: expected at most the {len(sampler.by_class)} classes of the fold")
        lacking = sampler.lacking(dataset.class_pixels("val")) if settings.absent else None
    if isinstance(dataset, DavisDataset):
        episodes = sum(len(video.frames) - 2 for video in dataset.videos)
    elif dataset.each_image_once:
        episodes = testing.episodes or len(used)
    else:
        episodes = testing.episodes or rules.episodes
    told = {
        "dataset": dataset.name,
        "protocol": rules.name,
        "rules": asdict(rules),
        "fold": settings.fold,
        "shots": settings.shots,
        "fusion": testing.fusion if settings.shots > 1 else None,
        "episodes": episodes,
        "folds": f"{len(dataset.folds)} {dataset.folds.rule}",
        "lists": [dataset.list_digest("val"), images.pairs and checkpoints.short_digest(images.pairs)],
        "absent": settings.absent,
        "memory": [settings.memory, settings.memory_confidence] if settings.memory else None,
        **({"ways": settings.ways} if settings.ways > 1 else {}),
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
        ways=settings.ways,
        vote=testing.fusion == "vote",
        lacking=lacking,
        tasks=settings.tasks,
        task_cpus=settings.task_cpus,
        memory=settings.memory,
        memory_confidence=settings.memory_confidence,
        tracking_uri=places.tracking_uri,
        inputs=(datasets.data_input(dataset, "val", used), *stores.inputs(opened, "test")),
        trained_by=subject.trained_by,
        panel=settings.panel or "",
        masks=settings.masks or "",
    )
    about = {
        **told,
        "variant": subject.title,
        "trained_on": subject.trained_on,
        "left_out": images.left_out,
    }
    return plan, subject.title, decisive, about


def check_flags(settings: Settings, video: bool) -> None:
    """Raise UserError, naming the flag, for one that would have no effect."""
    testing = settings.testing
    of_images = {
        "--absent": settings.absent,
        "--seeds": testing.seeds > 1,
        "--shots": settings.shots > 1,
        "--ways": settings.ways > 1,
        "--fusion": testing.fusion != "average",
        "--tasks": settings.tasks > 1,
        "--pairs": settings.benchmark.pairs is not None,
        "--panel": settings.panel is not None,
    }
    given = [flag for flag, is_given in of_images.items() if is_given] if video else []
    if given:
        raise UserError(f"{given[0]}: has no meaning for videos, whose support is the first frame; leave it out")
    if settings.memory and not video:
        raise UserError("--memory: has no meaning but for videos; leave it out")
    if settings.memory and settings.method not in ("segmenter", "peak"):
        raise UserError(f"--memory: expected a method that gives probabilities, got {settings.method}; leave it out")
    if settings.ways > 1 and (settings.absent or testing.fusion == "vote"):
        raise UserError("--ways: has no meaning for absent objects, nor for votes; leave one of them out")
    if settings.ways > 1 and settings.panel:
        raise UserError("--ways, --panel: a panel shows one class; leave one of them out")
    if testing.seeds > 1 and (settings.panel or settings.masks):
        raise UserError("--panel, --masks: each seed would overwrite the one before; take one seed")


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each measure over results, its standard deviation, and each seed's own."""
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


if __name__ == "__main__":
    main(Settings, job)
