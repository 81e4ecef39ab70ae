"""What each switch is worth: the recipe with one at a time at the paper's value, and without one part of the method.

Every model is trained on each fold with each seed, and compared with the recipe's own of that fold and seed.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fsdino.config import SegmenterConfig
from pipelines.recipes import Episodic, paper_recipe

OWN = "as it is"
PARTS = {"semantic_prompt": False, "adapter": "joint"}  # of the paper's method; what it ablates itself
OF_CORRELATION = ("refine", "support_weights", "similarity", "start")  # without effect in the compact variant
TRAINING: dict[str, Any] = {"balance": 0.0, "flip": False, "clip": None, "ema": 0.0, "label_px": None}


@dataclass(frozen=True)
class Trial:
    """One model to train and to score."""

    name: str
    """The flag that changes the recipe."""
    model: SegmenterConfig
    episodic: Episodic
    fold: int
    seed: int

    @property
    def title(self) -> str:
        """Of the step that scores it."""
        return f"score {self.name}, fold {self.fold}, seed {self.seed}"


def trials(model: SegmenterConfig, episodic: Episodic, folds: Sequence[int], seeds: Sequence[int]) -> Iterator[Trial]:
    """Fold by fold and seed by seed, the recipe's own model first."""
    for fold in folds:
        for seed in seeds:
            for name, (changed, training) in changes(model, episodic).items():
                yield Trial(name, changed, training, fold, seed)


def changes(model: SegmenterConfig, episodic: Episodic) -> dict[str, tuple[SegmenterConfig, Episodic]]:
    """The recipe's own model, without presence scores, as every query of a table shows its class; then one for each
    switch that departs from the paper, at the paper's value (the literal one for `start`), one for each part of the
    method, without it, and one of the other variant."""
    model = replace(model, presence=False)
    models = {OWN: (model, episodic)}
    paper = replace(paper_recipe().model, start="pytorch")
    for field in fields(model):
        if model.variant == "compact" and field.name in OF_CORRELATION:
            continue
        own, other = getattr(model, field.name), getattr(paper, field.name)
        if field.name == "variant":
            other = "compact" if own == "4d" else "4d"
        elif field.name == "sam_decoder":
            continue  # its checkpoint is there or is not
        elif own == other:
            other = PARTS.get(field.name, own)
        if own != other:
            changed = {field.name: other}
            if field.name == "neighbours":
                changed["self_support"] = False
            models[_flag(field.name, other)] = (replace(model, **changed), episodic)
    for name, other in (TRAINING | {"decoder_lr": episodic.lr}).items():
        if getattr(episodic, name) != other:
            models[_flag(name, other)] = (model, replace(episodic, **{name: other}))
    return models


Scores = dict[str, dict[int, dict[int, float]]]
"""mIoU in [0, 1] by model, fold and seed."""


def scores_of(tried: Sequence[Trial], results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """From the results of steps."""
    scores: Scores = {}
    for trial in tried:
        scores.setdefault(trial.name, {}).setdefault(trial.fold, {})[trial.seed] = results[trial.title]["miou"]
    return scores


def table(scores: Scores) -> list[str]:
    """Markdown: how many points of mIoU worse each change is, on each fold (mean over seeds), and on the mean of the
    folds with the deviation of a seed's difference."""
    folds, seeds = sorted(scores[OWN]), sorted(next(iter(scores[OWN].values())))
    lines = [
        f"| changed to | {' | '.join(f'fold {f}' for f in folds)} | mean | worse in |",
        "|---|" + "---|" * (len(folds) + 2),
    ]
    for name, of in scores.items():
        if name == OWN:
            cells = [f"{100 * statistics.fmean(of[f].values()):.1f}" for f in folds]
            mean = [100 * statistics.fmean(of[f][seed] for f in folds) for seed in seeds]
            lines.append(f"| {OWN}: mIoU | {' | '.join(cells)} | {spread(mean)} | |")
            continue
        lost = {(f, seed): 100 * (scores[OWN][f][seed] - of[f][seed]) for f in folds for seed in seeds}
        cells = [f"{-statistics.fmean(lost[f, seed] for seed in seeds):+.1f}" for f in folds]
        mean = [-statistics.fmean(lost[f, seed] for f in folds) for seed in seeds]
        worse = sum(value > 0 for value in lost.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} | {spread(mean, '+')} | {worse} of {len(lost)} |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Mean and deviation over seeds."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _flag(field: str, value: object) -> str:
    flag = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"
