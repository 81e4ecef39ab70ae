"""Tables of evaluations: a row holds runs that differ in nothing but fold, test seed and checkpoint."""

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.published import ABSENT, BENCHMARKS, ROWS, Published

OF_A_FOLD = (
    "fold",
    "images",
    "labels",
    "features",
    "checkpoint",
    "test_seed",
    "trained.fold",
    "trained.images",
    "trained.steps",
    "trained.labels",
    "trained.features",
    "trained.base_images",
    "trained.held_out_classes",
    "trained.validation",
)
"""What may differ within a row."""
OF_THE_SAME = ("checkpoint", "images", "labels", "features")
"""What all seeds of a fold share."""
MOST_NAMED = 3  # differences in a row's name
MISSING = "-"

Scores = dict[str, float]


@dataclass(frozen=True)
class Method:
    """Evaluations of one identity: scores by fold and test seed."""

    identity: dict[str, str]
    folds: dict[str, dict[str, Scores]] = field(default_factory=dict)
    scored: dict[str, str] = field(default_factory=dict)
    """Fold to the checkpoint and images that are shown."""
    runs: dict[tuple[str, str], str] = field(default_factory=dict)
    """Fold and seed to a run in MLflow."""

    def cell(self, fold: str, measure: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds of a fold."""
        return over([scores[measure] for scores in self.folds[fold].values()])

    def mean(self, measure: str) -> tuple[float, float | None]:
        """Mean over folds; the deviation is that of the seeds' own means over folds, if all folds have the seeds."""
        seeds = [set(of_fold) for of_fold in self.folds.values()]
        shared = sorted(set.intersection(*seeds)) if seeds else []
        mean = statistics.fmean(self.cell(fold, measure)[0] for fold in self.folds)
        if any(of_fold != set(shared) for of_fold in seeds):
            return mean, None
        return over([statistics.fmean(of_fold[seed][measure] for of_fold in self.folds.values()) for seed in shared])


def over(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; no deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def gather(tracking_uri: str, **asked: Any) -> dict[str, Method]:
    """The evaluations of these parameters, each method under its name; of a fold that was evaluated with several
    checkpoints, the newest."""
    from pipelines import tracking

    methods: dict[tuple[tuple[str, str], ...], Method] = {}
    several: set[str] = set()
    earlier = 0
    for run in tracking.runs(tracking_uri, "evaluate"):  # newest first
        params, metrics = run["params"], run["metrics"]
        if tracking.SUMMARY in run["tags"]:
            continue
        if "rules.name" not in params or "absent" not in params:
            earlier += 1
            continue
        if any(params.get(key) != str(value) for key, value in asked.items()):
            continue
        identity = {key: value for key, value in sorted(params.items()) if key not in OF_A_FOLD}
        if "trained.fold" in params:
            identity["trained.classes"] = "all" if params["trained.fold"] == "None" else "base"
        method = methods.setdefault(tuple(identity.items()), Method(identity))
        # On a data set of one fold, a row is the models of another's folds.
        transferred = params.get("trained.dataset", "None") not in ("None", params["dataset"])
        one_fold = params.get("folds", "1 ").split()[0] == "1"
        of_folds = transferred and one_fold and identity["trained.classes"] == "base"
        fold, seed = params["trained.fold" if of_folds else "fold"], params["test_seed"]
        scored = " ".join(str(params.get(key)) for key in OF_THE_SAME)
        if method.scored.setdefault(fold, scored) != scored:
            several.add(f"{params['method']}, fold {fold}: several checkpoints or images; the newest are shown")
            continue
        method.runs.setdefault((fold, seed), run["run_id"])
        method.folds.setdefault(fold, {}).setdefault(seed, {key: round(value, 6) for key, value in metrics.items()})
    for line in sorted(several):
        print(line, file=sys.stderr)
    if earlier:
        print(f"{earlier} evaluations of an earlier release are left out; rerun evaluate", file=sys.stderr)
    return named(list(methods.values()))


def named(methods: list[Method]) -> dict[str, Method]:
    """Methods by name: what was scored, and, where two share that, what else sets each apart from the first."""
    names: dict[str, Method] = {}
    first: dict[str, Method] = {}
    for method in methods:
        name = method.identity["method"]
        other = first.setdefault(name, method)
        if other is not method:
            apart = [f"{k} {v}" for k, v in method.identity.items() if other.identity.get(k) != v]
            more = f" and {len(apart) - MOST_NAMED} more" if len(apart) > MOST_NAMED else ""
            name = f"{name} ({', '.join(apart[:MOST_NAMED])}{more})"
            while name in names:
                name += "'"
        names[name] = method
    return names


Table = list[list[str]]
"""Rows of cells; the first is the header."""


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])


def scores(title: str, methods: Mapping[str, Method], num_folds: int = 4) -> Table:
    """mIoU (FB-IoU) in percent of each fold, with deviations over seeds, methods by rising mean; the mean where every
    fold is there."""
    folds = [str(fold) for fold in range(num_folds)]
    table = [[f"{title}, mIoU (FB-IoU)", *(f"fold {fold}" for fold in folds), "mean"]]
    for name, method in sorted(methods.items(), key=lambda entry: entry[1].mean("miou")[0]):
        cells = [
            _pair(method.cell(fold, "miou"), method.cell(fold, "fb_iou")) if fold in method.folds else MISSING
            for fold in folds
        ]
        whole = set(folds) <= set(method.folds)
        table.append([name, *cells, _pair(method.mean("miou"), method.mean("fb_iou")) if whole else MISSING])
    return table


def absent(title: str, methods: Mapping[str, Method], num_folds: int = 4) -> Table:
    """Share of rightly empty masks, in percent; published ones behind ours."""
    folds = [str(fold) for fold in range(num_folds)]
    table = [[f"{title}, rightly empty masks", *(f"fold {fold}" for fold in folds), "mean"]]
    for name, method in sorted(methods.items(), key=lambda entry: entry[1].mean("empty")[0]):
        cells = [percent(method.cell(fold, "empty")) if fold in method.folds else MISSING for fold in folds]
        table.append([name, *cells, percent(method.mean("empty")) if set(folds) <= set(method.folds) else MISSING])
    for row in ABSENT:
        about = f"{row.method}, {row.encoder} ({row.note}; {row.source})"
        table.append([about, *[MISSING] * num_folds, _plain(row.one[0])])
    return table


@dataclass(frozen=True)
class Group:
    """Evaluations that are comparable: one data set, protocol, number of classes, shots and episodes."""

    dataset: str
    protocol: str
    ways: str
    shots: str
    fusion: str
    episodes: str
    absent: bool
    methods: dict[str, Method]

    @property
    def title(self) -> str:
        """In words."""
        vote = ", by vote" if self.fusion == "vote" else ""
        ways = f"{self.ways}-way " if self.ways != "1" else ""
        return f"{self.dataset}, {self.protocol}, {ways}{self.shots}-shot{vote}, {self.episodes} episodes"


def folds_table(number: int, one: Mapping[str, Method], five: Mapping[str, Method], protocol: str) -> Table:
    """Table 1 or 2: published rows, then ours, whose missing cells are shown as missing."""
    head = [f"{k}-shot {of}" for k in (1, 5) for of in ("f0", "f1", "f2", "f3", "mean")]
    table = [["method", "encoder", "protocol", *head, "source"]]
    for row in _published(number):
        cells = [*_published_folds(row.one), *_published_folds(row.five)]
        table.append([row.method, row.encoder, "its own", *cells, _source(row)])
    for name in dict.fromkeys([*one, *five]):
        of = [shots.get(name) for shots in (one, five)]
        cells = [cell for method in of for cell in _our_folds(method)]
        table.append([f"**{name}**", _encoder(next(filter(None, of))), protocol, *cells, "this report"])
    return table


def transfer_table(fss: Mapping[str, Method], davis: Mapping[str, Method]) -> Table:
    """Table 3: models of COCO-20i (or of what ours were trained on) on FSS-1000 and DAVIS-17."""
    table = [["method", "encoder", "trained on", "FSS-1000, mIoU", "DAVIS-17, J&F", "source"]]
    for row in _published(3):
        table.append([row.method, row.encoder, "its own", *(_plain(value) for value in row.one), _source(row)])
    for name in dict.fromkeys([*fss, *davis]):
        of = [fss.get(name), davis.get(name)]
        cells = [
            MISSING if method is None else percent(method.mean(measure))
            for method, measure in zip(of, ("miou", "j_and_f"), strict=True)
        ]
        known = next(filter(None, of))
        trained = known.identity.get("trained.dataset", MISSING)
        table.append([f"**{name}**", _encoder(known), trained, *cells, "this report"])
    return table


def ablation_table(methods: Mapping[str, Method], dataset: str) -> Table:
    """Table 4: the parts of the method, mean over folds."""
    table = [["model", "data set", "mIoU", "FB-IoU", "source"]]
    for row in _published(4):
        table.append([row.method, "COCO-20i", *(_plain(value) for value in row.one), _source(row)])
    for name, method in sorted(methods.items(), key=lambda entry: entry[1].mean("miou")[0]):
        if "model.variant" in method.identity:
            means = [percent(method.mean(measure)) for measure in ("miou", "fb_iou")]
            folds = "" if len(method.folds) == 4 else f", folds {' '.join(sorted(method.folds))}"
            table.append([f"**{parts(name, method)}**{folds}", dataset, *means, "this report"])
    return table


def parts(name: str, method: Method) -> str:
    """A model by the paper's names of its parts."""
    of = method.identity
    words = ["BA" if of.get("model.adapter") == "distilled" else f"{of.get('model.adapter')} adapter"]
    words += ["SVP"] if of.get("model.semantic_prompt") == "True" else []
    words += ["PCS"] + (["4D"] if of.get("model.variant") == "4d" else [])
    return f"{'+'.join(words)} ({name})"


def percent(value: tuple[float, float | None]) -> str:
    """A share as per cent, with its deviation."""
    mean, deviation = value
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def notes(numbers: Iterable[int]) -> list[str]:
    """What is to be said of published rows."""
    told = [row for row in ROWS if row.table in numbers and row.note]
    return [f"Table {row.table}, {row.method}: {row.note}" for row in told]


def title_of(number: int) -> str:
    """A table of the paper, by what it is on."""
    return f"Table {number}: {BENCHMARKS[number]}"


def _published(number: int) -> list[Published]:
    return [row for row in ROWS if row.table == number]


def _published_folds(values: Sequence[float]) -> list[str]:
    """Four folds and the mean, from as many as are known."""
    padded = [math.nan] * (5 - len(values)) + list(values)
    return [_plain(value) for value in padded]


def _our_folds(method: Method | None) -> list[str]:
    if method is None:
        return [MISSING] * 5
    cells = [percent(method.cell(f, "miou")) if f in method.folds else MISSING for f in map(str, range(4))]
    return [*cells, percent(method.mean("miou")) if len(method.folds) == 4 else MISSING]


def _plain(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1f}"


def _source(row: Published) -> str:
    return row.source if row.checked else f"{row.source} (quoted)"


def _encoder(method: Method | None) -> str:
    return MISSING if method is None else f"{method.identity.get('late.model')}@{method.identity.get('late.res_px')}"


def _pair(one: tuple[float, float | None], other: tuple[float, float | None]) -> str:
    return f"{percent(one)} ({100 * other[0]:.1f})"
