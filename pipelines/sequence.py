"""Several commands in a row, in one process on one Ray, under one progress bar.

A rerun after a kill resumes: a finished step just prints its result, an interrupted one resumes by itself.
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

from fsdino.config import SegmenterConfig
from fsdino.data.protocols import protocol_of
from fsdino.errors import UserError
from fsdino.kinds import Kind
from pipelines import ablation
from pipelines.checks import Few, Fold, Place
from pipelines.recipes import Photographs, Recipe, RecipeName, Testing

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
    methods: tuple[Method, ...] = ("prototype", "two-prototype", "nearest", "matching")
    """Baselines without training to score beside them."""
    table: Literal[1, 2, 3, 4] | None = None
    """Run what a table of the paper needs: 1 and 2, both variants on all folds, 1- and 5-shot; 3, the models on
    FSS-1000 and DAVIS-17, 1-shot; 4, the parts of the method on all folds, without baselines. Overrides these flags."""
    ablate: bool = False
    """Instead of variants and methods: the recipe's model with one switch at a time at the paper's value, 1-shot; the
    table says what each switch is worth."""
    train_seeds: Few = 1
    """With --ablate: how many seeds each model is trained with, from --seed on."""
    fss: Place | None = None
    """FSS-1000, for table 3."""
    davis: Place | None = None
    """DAVIS-17, for table 3."""


TRANSFER: tuple[tuple[str, Kind, str], ...] = (("FSS-1000", "fss1000", "fss"), ("DAVIS-17", "davis2017", "davis"))
"""Data sets of table 3: name, kind, and the setting with the place."""
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
    if study.ablate:
        return steps + [step for trial in trials_of(study) for step in _tried(trial, study, distilled)]
    for fold in study.folds:
        for method in study.methods if study.table != 3 else ():
            steps += [_score(method, fold, shots, {"method": method}) for shots in study.shots]
        for name, model in models_of(study).items():
            train = Step(
                f"train {name}, fold {fold}", "train_episodic", _with(distilled, {"fold": fold, "model": model})
            )
            steps.append(train)
            if study.table == 3:
                steps += _transfer(study, name, fold, {"model": model}, train.title)
            else:
                steps += [_score(name, fold, shots, {"model": model}, train.title) for shots in study.shots]
    for method in study.methods if study.table == 3 else ():
        steps += _transfer(study, method, 0, {"method": method})
    return steps


def _tried(trial: ablation.Trial, study: Study, distilled: Callable[[Results], dict[str, Any]]) -> list[Step]:
    """Training and score of a model of the ablation."""
    own = {"model": trial.model, "fold": trial.fold}
    training = f"train {trial.name}, fold {trial.fold}, seed {trial.seed}"
    workers = replace(study.workers, seed=trial.seed)
    settings = {**own, "episodic": trial.episodic, "workers": workers, "register": False}
    train = Step(training, "train_episodic", _with(distilled, settings))
    return [train, _score(trial.name, trial.fold, 1, own, training, trial.title)]


def trials_of(study: Study) -> list[ablation.Trial]:
    """The models of the ablation."""
    first = study.workers.seed
    seeds = range(first, first + study.train_seeds)
    return list(ablation.trials(study.model, study.episodic, study.folds, seeds))


def asked(study: Study) -> Study:
    """The study with what its table needs. Raises UserError for flags that exclude each other."""
    if study.ablate and study.table is not None:
        raise UserError(f"--ablate, --table {study.table}: expected one of them; table 4 has the paper's own ablation")
    if study.ablate and study.shots != (1,):
        raise UserError("--ablate: scores one support; leave out --shots")
    if study.ablate and study.model.adapter != "distilled":
        raise UserError(f"--ablate, --adapter {study.model.adapter}: expected distilled, which is compared with joint")
    if study.train_seeds > 1 and not study.ablate:
        raise UserError(f"--train-seeds {study.train_seeds}: is of --ablate; train with --seed instead")
    for model in models_of(study).values():
        model.check()
    folds = tuple(range(4))
    seeds = max(study.testing.seeds, protocol_of(study.benchmark.protocol).seeds)
    if study.table in (1, 2):
        testing = replace(study.testing, seeds=seeds)
        return replace(study, folds=folds, shots=(1, 5), variants=("compact", "4d"), testing=testing)
    if study.table == 3:
        if study.fss is None and study.davis is None:
            raise UserError("--table 3: expected the folder of FSS-1000 (--fss), of DAVIS-17 (--davis), or both")
        return replace(study, shots=(1,))
    if study.table == 4:
        return replace(study, folds=folds, shots=(1,), variants=("compact", "4d"), methods=())
    return study


def models_of(study: Study) -> dict[str, SegmenterConfig]:
    """The models to train, by what steps call them: the variants, and for table 4 what lacks a part."""
    models: dict[str, SegmenterConfig] = {v: replace(study.model, variant=v) for v in study.variants}
    if study.table == 4:
        bare = replace(study.model, variant="compact", semantic_prompt=False)
        undistilled = replace(study.model, variant="4d", adapter="joint")
        models |= {"compact without semantic prompt": bare, "4d without distillation": undistilled}
    return models


def _transfer(study: Study, name: str, fold: int, own: dict[str, Any], trained: str | None = None) -> list[Step]:
    """Scores on the data sets of table 3, features straight from their images."""
    steps = []
    for label, kind, place in TRANSFER:
        if getattr(study, place) is not None:
            places = replace(study.places, data=getattr(study, place), dataset=kind, train_list=None, test_list=None)
            testing = Testing(test_seed=study.testing.test_seed)
            if label == "FSS-1000":
                testing = replace(study.testing, episodes=None)
            benchmark = replace(study.benchmark, pairs=None)
            here = {**own, "places": places, "testing": testing, "benchmark": benchmark, "from_images": True}
            steps.append(_score(name, 0, 1, here, trained, f"score {name}, trained on fold {fold}, on {label}"))
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


def _score(
    name: str, fold: int, shots: int, own: dict[str, Any], trained: str | None = None, title: str | None = None
) -> Step:
    def settings(results: Results) -> dict[str, Any]:
        checkpoint = {"checkpoint": results[trained]["checkpoint"]} if trained else {}
        if own.get("method") == "peak" and "distil" in results:
            checkpoint = {"adapter_checkpoint": results["distil"]["adapter"]}
        return {"fold": fold, "shots": shots, **own, **checkpoint}

    return Step(title or score_title(name, fold, shots), "evaluate", settings)


def score_title(name: str, fold: int, shots: int) -> str:
    """The title of a scoring step."""
    return f"score {name}, fold {fold}, {shots}-shot"


@contextmanager
def _into(log: TextIO, bar: tqdm) -> Iterator[None]:
    """Output of the block goes to the log; the last line of a progress bar in it also after the overall bar."""
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
