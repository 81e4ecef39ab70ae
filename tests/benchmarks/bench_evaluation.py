"""Evaluation from cached features against the bare calls of the segmenter, and how fast COCO's masks are decoded.

    python -m tests.benchmarks.bench_evaluation --data VOCdevkit/VOC2012 --store outputs/stores \
        --checkpoint CHECKPOINT --coco COCO --out docs/benchmarks/evaluation.md

Both contenders run the same episodes in every round, in turn. The bare one gets batches that are already in memory and
calls `encode_support` and `segment`, nothing else.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from fsdino.data.dataset import open_dataset
from pipelines import evaluate, methods, scoring
from pipelines.cli import parse
from pipelines.scoring_plan import ScoringPlan
from tests.benchmarks.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """Benchmark evaluation."""

    data: Path
    """PASCAL VOC."""
    store: Path
    """Root of its stores."""
    checkpoint: Path
    """A segmenter of fold 0."""
    coco: Path | None = None
    """COCO, to time its masks."""
    recipe: str = "offline"
    episodes: int = 1000
    rounds: int = 3
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """Time, compare, print."""
    lines = [
        "# Evaluation",
        "",
        f"{provenance('bench_evaluation')}: {settings.episodes} episodes of fold 0, 1-shot, {settings.rounds} rounds.",
        "",
    ]
    plan = planned(settings)
    scorer = scoring.scorer_of(plan)
    whole, bare = [], []
    scorer.score(0, range(64))  # warm
    for _ in range(settings.rounds):
        started = time.perf_counter()
        scorer.score(0, range(settings.episodes))
        whole.append(time.perf_counter() - started)
        bare.append(bare_seconds(scorer, settings.episodes))
    ratios = [w / b for w, b in zip(whole, bare, strict=True)]
    lines += [
        "| | s, each round | ms an episode | over the bare calls, median |",
        "|---|---|---|---|",
        f"| bare calls | {', '.join(f'{t:.1f}' for t in bare)} | {1e3 * min(bare) / settings.episodes:.1f} | 1.00 |",
        f"| evaluation | {', '.join(f'{t:.1f}' for t in whole)} | {1e3 * min(whole) / settings.episodes:.1f} | "
        f"{statistics.median(ratios):.2f} |",
    ]
    if settings.coco is not None:
        lines += ["", f"COCO's masks: {1e3 * mask_seconds(settings.coco):.2f} ms each, decoded from run lengths."]
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out is not None:
        settings.out.write_text(text)


def planned(settings: Settings) -> ScoringPlan:
    """What `evaluate` would run."""
    flags = ["--recipe", settings.recipe, "--data", settings.data, "--store", settings.store, "--fold", 0]
    parsed = parse(evaluate.Settings, [*map(str, flags), "--checkpoint", str(settings.checkpoint)])
    return replace(evaluate.planned(parsed)[0], episodes=settings.episodes)


@torch.inference_mode()
def bare_seconds(scorer: scoring.Scorer, episodes: int) -> float:
    """Time of the calls alone, over batches in memory."""
    held, seconds = 128, 0.0
    for at in range(0, episodes, held):
        drawn = [scorer.episode(0, i) for i in range(at, min(at + held, episodes))]
        chunks = [drawn[i : i + scoring.BATCH] for i in range(0, len(drawn), scoring.BATCH)]
        batches = [scorer.loader.load(chunk).to(scorer.device) for chunk in chunks]
        started = time.perf_counter()
        for batch in batches:
            methods.predict(scorer.method, batch, vote=False)
        seconds += time.perf_counter() - started
    return seconds


def mask_seconds(place: Path) -> float:
    """Mean time of a class's mask."""
    dataset = open_dataset(str(place))
    wanted = [(i, c) for i, classes in dataset.class_pixels("val").items() for c in classes]
    started = time.perf_counter()
    for image_id, class_id in wanted:
        dataset.mask(image_id, class_id)
    return (time.perf_counter() - started) / len(wanted)


if __name__ == "__main__":
    main(tyro.cli(Settings))
