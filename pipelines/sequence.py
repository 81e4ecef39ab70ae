"""Several commands in a row, in one process on one Ray, under one progress bar; what is done is skipped by each.

A rerun after a kill resumes: a finished command only reports, an interrupted one resumes by itself.
"""

import importlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from pipelines.checks import Few, Fold
from pipelines.recipes import Photographs, Recipe, RecipeName

Method = Literal["prototype", "two-prototype", "nearest", "matching", "peak"]


@dataclass(frozen=True)
class Study(Recipe):
    """Run all the steps that a table of results needs, in order, and print the table."""

    recipe: RecipeName
    folds: tuple[Fold, ...] = (0, 1, 2, 3)
    """Folds to train and test."""
    shots: tuple[Few, ...] = (1,)
    """Supports in a test episode; each number is a table."""
    variants: tuple[Literal["compact", "4d"], ...] = ("compact", "4d")
    """Models to train in each fold."""
    methods: tuple[Method, ...] = ("prototype", "two-prototype", "nearest")
    """Baselines without training to score beside them."""


Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One command. `own` are settings beyond the study's sections, from the results of the steps before."""

    title: str
    command: str
    own: Callable[[Results], dict[str, Any]] = field(default=lambda results: {})


def plan(study: Study) -> list[Step]:
    """The steps up to the last score."""
    adapter, steps = study.model.adapter, []
    coarse = tuple(res for res in study.distillation.distill_res if res != study.backbone.res)
    coarse = coarse if adapter == "distilled" else ()
    elsewhere = study.photographs.images is not None
    if adapter == "distilled":
        steps.append(Step("teacher embeddings", "extract_teacher"))
        if elsewhere:
            early = _always(coarse_res=coarse, features=("early",))
            steps.append(Step("features for distillation", "extract_features", early))
            steps.append(Step("distil", "distill"))
    own = {"photographs": Photographs()} if elsewhere else {"coarse_res": coarse}
    steps.append(Step("features", "extract_features", _always(**own)))
    if adapter == "distilled" and not elsewhere:
        steps.append(Step("distil", "distill"))

    def distilled(results: Results) -> dict[str, Any]:
        return {"adapter_checkpoint": results["distil"]["adapter"]} if adapter == "distilled" else {}

    if adapter != "joint":
        steps.append(Step("bake embeddings", "bake_embeddings", distilled))
    for fold in study.folds:
        for method in study.methods:
            steps += [_score(method, fold, shots, {"method": method}) for shots in study.shots]
        for variant in study.variants:
            model = replace(study.model, variant=variant)
            train = Step(
                f"train {variant}, fold {fold}", "train_episodic", _with(distilled, {"fold": fold, "model": model})
            )
            steps.append(train)
            steps += [_score(variant, fold, shots, {"model": model}, train.title) for shots in study.shots]
    return steps


def run(study: Study, steps: Sequence[Step], log: Path) -> Results:
    """Title of each step to its result. What the commands print goes to the log; the first error ends the sequence."""
    results: Results = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, tqdm(total=len(steps), unit="step", file=sys.stderr) as bar:
        for step in steps:
            bar.set_description(step.title, refresh=False)
            bar.set_postfix_str("")
            file.write(f"\n=== {time.strftime('%F %T')} {step.title} ({step.command})\n")
            module = importlib.import_module(f"pipelines.{step.command}")
            with _into(file, bar):
                results[step.title] = module.job(settings_of(module.Settings, study, step.own(results)))
            bar.update()
    return results


def settings_of(kind: type, study: Study, own: dict[str, Any]) -> Any:
    """A command's settings: the study's sections that it has, and its own."""
    shared = {f.name for f in fields(study)} & {f.name for f in fields(kind)} - own.keys()
    return kind(**{name: getattr(study, name) for name in shared}, **own)


def stop_ray() -> None:
    """Stop the Ray that the steps shared, if any needed one."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _always(**own: Any) -> Callable[[Results], dict[str, Any]]:
    return lambda _: own


def _with(also: Callable[[Results], dict[str, Any]], own: dict[str, Any]) -> Callable[[Results], dict[str, Any]]:
    return lambda results: {**own, **also(results)}


def _score(name: str, fold: int, shots: int, own: dict[str, Any], trained: str | None = None) -> Step:
    def settings(results: Results) -> dict[str, Any]:
        checkpoint = {"checkpoint": results[trained]["checkpoint"]} if trained else {}
        return {"fold": fold, "shots": shots, **own, **checkpoint}

    return Step(score_title(name, fold, shots), "evaluate", settings)


def score_title(name: str, fold: int, shots: int) -> str:
    """The title of a scoring step."""
    return f"score {name}, fold {fold}, {shots}-shot"


@contextmanager
def _into(log: TextIO, bar: tqdm) -> Iterator[None]:
    """Output of the block goes to the log; the last line of a progress bar in it also behind the overall bar."""
    with redirect_stdout(log), redirect_stderr(_Tail(log, bar)):
        yield
    log.flush()


class _Tail(io.TextIOBase):
    def __init__(self, log: TextIO, bar: tqdm):
        self.log, self.bar = log, bar

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self.bar.set_postfix_str(text.strip())
        return self.log.write(text)

    def flush(self) -> None:
        self.log.flush()
