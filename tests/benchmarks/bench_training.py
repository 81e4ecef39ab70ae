"""Steps of episodic training: fed by the loader against a batch that is held, and against recomputing the features.

    python -m tests.benchmarks.bench_training --data VOCdevkit/VOC2012 --store outputs/stores --runs outputs/runs \
        --out docs/benchmarks/training.md

The first table takes a recipe's own stores: in every round some steps on one batch that stays in memory, as many on
batches that the loader reads, and the loader alone. The second takes the paper's sizes with random weights and
features: a step on what a cache would hold, against the same step behind an encoder that computes it from images.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import tyro

from fsdino import paper
from fsdino.encoder import DinoV2Encoder
from fsdino.episodic import EpisodeBatch, EpisodeLoss
from fsdino.segmenter import Segmenter
from fsdino.specs import DINOV2
from pipelines import episodic_loop, heap, train_episodic, training
from pipelines.cli import parse
from pipelines.loading import EpisodeLoader
from pipelines.recipes import Workers
from tests.benchmarks.bench_networks import episodes, segmenter
from tests.benchmarks.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """Benchmark training steps."""

    data: Path
    """PASCAL VOC."""
    store: Path
    """Root of its stores."""
    runs: Path
    """Root of the runs, for the adapter."""
    recipe: str = "offline"
    fold: int = 0
    steps: int = 12
    """Steps of each contender in a round."""
    rounds: int = 3
    full_size_rounds: int = 2
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """Time, compare, print."""
    heap.keep_freed_memory()
    lines = ["# Training", "", f"{provenance('bench_training')}.", ""]
    lines += [f"## Feeding: recipe `{settings.recipe}`, fold {settings.fold}, {settings.steps} steps a round", ""]
    lines += [*fed_table(settings), ""]
    lines += ["## Caching: ViT-B/14 at 518 px, batch 8, 1-shot, random weights", "", *cached_table(settings)]
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out is not None:
        settings.out.write_text(text)


def fed_table(settings: Settings) -> list[str]:
    """Held, fed, and the loader alone."""
    flags = ["--recipe", settings.recipe, "--data", settings.data, "--store", settings.store]
    flags += ["--out", settings.runs, "--fold", settings.fold, "--name", "bench"]
    chosen = parse(train_episodic.Settings, [*map(str, flags)])
    job = train_episodic.planned(chosen, settings.fold)[1]()
    worker = training.Worker(torch.device("cpu"), 0, 1, "", chosen.device.train_precision, chosen.workers, None, None)
    step = stepper(episodic_loop.build_segmenter(job), worker)
    loader = EpisodeLoader(job.dataset, job.late, job.query, job.late.fingerprint.view_seed, job.label_px)
    feed = episodic_loop.fed(loader, job, worker, 0)
    held = next(feed)
    step(held)
    times: dict[str, list[float]] = {"held": [], "fed": [], "the loader alone": []}
    for _ in range(settings.rounds):
        times["held"].append(seconds(lambda: [step(held) for _ in range(settings.steps)]) / settings.steps)
        step(next(feed))
        times["fed"].append(seconds(lambda: [step(next(feed)) for _ in range(settings.steps)]) / settings.steps)
        times["the loader alone"].append(seconds(lambda: [next(feed) for _ in range(settings.steps)]) / settings.steps)
    return table(times, "held")


def cached_table(settings: Settings) -> list[str]:
    """A step on features that are there, and one that computes them first, in both precisions."""
    single, half = (cached_times(settings, precision) for precision in ("fp32", "bf16"))
    return [*single, *half[2:]]


def cached_times(settings: Settings, precision: str) -> list[str]:
    """As a table, at the paper's sizes."""
    network, batch, images = segmenter().train(), episodes(paper.BATCH_SIZE), torch.randn(16, 3, 518, 518)
    encoder = DinoV2Encoder(timm.create_model(DINOV2["dinov2_vitb14"].timm, num_classes=0), "random").eval()
    worker = training.Worker(torch.device("cpu"), 0, 1, "", precision, Workers(), None, None)
    step = stepper(network, worker)

    def recomputed() -> None:
        with torch.inference_mode(), worker.autocast():
            for at in range(0, len(images), 4):  # eight supports and eight queries
                network.embed(encoder(images[at : at + 4]).early)
        step(batch)

    step(batch)
    cached = f"{precision}, from the cache"
    times: dict[str, list[float]] = {cached: [], f"{precision}, from images": []}
    for _ in range(settings.full_size_rounds):
        times[cached].append(seconds(lambda: step(batch)))
        times[f"{precision}, from images"].append(seconds(recomputed))
    return table(times, cached)


def table(times: dict[str, list[float]], base: str) -> list[str]:
    """Milliseconds of each round, and the median of the rounds' ratios to the base's."""
    lines = ["| | ms a step, each round | over the first, median |", "|---|---|---|"]
    for name, of in times.items():
        ratio = statistics.median(t / b for t, b in zip(of, times[base], strict=True))
        lines.append(f"| {name} | {', '.join(f'{1e3 * t:.0f}' for t in of)} | {ratio:.3f} |")
    return lines


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stepper(network: Segmenter, worker: training.Worker) -> Callable[[EpisodeBatch], None]:
    """A step of training on one batch, as the loop takes it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model = EpisodeLoss(network)

    def step(batch: EpisodeBatch) -> None:
        losses = episodic_loop.train_step(model, optimiser, [batch], worker, None)
        losses["loss"].item()

    return step


if __name__ == "__main__":
    main(tyro.cli(Settings))
