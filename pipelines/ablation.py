"""What each departure from the paper is worth: the recipe with one switch at a time at the paper's value.

Every model is trained on each fold with each seed, and compared with the recipe's own of that fold and seed.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fsdino.config import SegmenterConfig
from pipelines.recipes import Episodic

OWN = "as it is"
PARTS = {"semantic_prompt": False, "adapter": "joint"}  # parts of the paper's method that it ablates itself
OF_CORRELATION = ("refine", "support_weights", "similarity", "start")  # without effect in the compact variant
TRAINING = {"balance": 0.0, "flip": False, "clip": None, "ema": 0.0, "label_px": None}


@dataclass(frozen=True)
class Ablation:
    """One model to train."""

    model: SegmenterConfig
    episodic: Episodic


def ablations(model: SegmenterConfig, episodic: Episodic) -> dict[str, Ablation]:
    """The recipe's own model, then one for each switch that departs from the paper, at the paper's value, and one for
    each part of the method, without it; the variant's is the other one."""
    found = {OWN: Ablation(model, episodic)}
    paper = SegmenterConfig()
    for field in fields(model):
        if model.variant == "compact" and field.name in OF_CORRELATION:
            continue
        own, literal = getattr(model, field.name), getattr(paper, field.name)
        if field.name == "variant":
            literal = "compact" if own == "4d" else "4d"
        elif own == literal:
            literal = PARTS.get(field.name, own)
        if own != literal:
            changed = {field.name: literal}
            if field.name == "neighbours":
                changed["self_support"] = False
            found[_name(field.name, literal)] = Ablation(replace(model, **changed), episodic)
    literals = TRAINING | {"decoder_lr": episodic.lr}
    for name, literal in literals.items():
        if getattr(episodic, name) != literal:
            found[_name(name, literal)] = Ablation(model, replace(episodic, **{name: literal}))
    return found


def table(scores: Mapping[str, Mapping[int, Mapping[int, float]]]) -> list[str]:
    """Markdown from the mIoU in [0, 1] of each model, fold and seed: what the recipe's own switch is worth in points on
    each fold (mean over seeds), and on the mean of the folds, with the deviation of a seed's difference."""
    folds, seeds = sorted(scores[OWN]), sorted(next(iter(scores[OWN].values())))
    lines = [
        f"| switch at the paper's value | {' | '.join(f'fold {f}' for f in folds)} | mean | recipe better in |",
        "|---|" + "---|" * (len(folds) + 2),
    ]
    for name, of in scores.items():
        if name == OWN:
            cells = [f"{100 * statistics.fmean(of[f].values()):.1f}" for f in folds]
            mean = [100 * statistics.fmean(of[f][seed] for f in folds) for seed in seeds]
            lines.append(f"| {OWN}: mIoU | {' | '.join(cells)} | {spread(mean)} | |")
            continue
        worth = {(f, seed): 100 * (scores[OWN][f][seed] - of[f][seed]) for f in folds for seed in seeds}
        cells = [f"{statistics.fmean(worth[f, seed] for seed in seeds):+.1f}" for f in folds]
        mean = [statistics.fmean(worth[f, seed] for f in folds) for seed in seeds]
        better = sum(value > 0 for value in worth.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} | {spread(mean, '+')} | {better} of {len(worth)} |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Mean and deviation over seeds."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def scores_of(results: Mapping[str, Mapping[str, Any]], titles: Iterator[tuple[str, int, int, str]]) -> dict:
    """mIoU by model, fold and seed, from the results of steps; `titles` say which is which."""
    scores: dict[str, dict[int, dict[int, float]]] = {}
    for name, fold, seed, title in titles:
        scores.setdefault(name, {}).setdefault(fold, {})[seed] = results[title]["miou"]
    return scores


def _name(field: str, value: object) -> str:
    flag = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {'none' if value is None else value}"
