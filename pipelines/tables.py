"""Tables of evaluations: a row holds runs that differ in nothing but fold and checkpoint."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OF_A_FOLD = ("fold", "images", "checkpoint", "trained.fold", "trained.images", "trained.base_images")
"""What may differ within a row."""
MOST_NAMED = 3  # differences in a row's name


@dataclass(frozen=True)
class Method:
    """Evaluations of one identity: fold to scores."""

    identity: dict[str, str]
    folds: dict[str, dict[str, float]]
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Fold to the checkpoint that is shown."""

    def mean(self, key: str) -> float:
        """Over folds."""
        return sum(scores[key] for scores in self.folds.values()) / len(self.folds)


def markdown(title: str, methods: Mapping[str, Method], num_folds: int = 4) -> str:
    """mIoU (FB-IoU) in percent, methods by rising mean; the mean where every fold is there."""
    folds = [str(fold) for fold in range(num_folds)]
    lines = [f"| {title}, mIoU (FB-IoU) | {' | '.join(f'fold {fold}' for fold in folds)} | mean |"]
    lines.append("|---" * (len(folds) + 2) + "|")
    for name, method in sorted(methods.items(), key=lambda entry: entry[1].mean("miou")):
        cells = [_cell(**method.folds[f]) if f in method.folds else "-" for f in folds]
        whole = len(method.folds) == len(folds)
        cells.append(_cell(method.mean("miou"), method.mean("fb_iou")) if whole else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gather(tracking_uri: str, **asked: Any) -> dict[str, Method]:
    """The evaluations of these parameters, each method under its name; of a fold that was evaluated with several
    checkpoints, the newest."""
    from pipelines import tracking

    methods: dict[tuple[tuple[str, str], ...], Method] = {}
    earlier = 0
    for run in tracking.runs(tracking_uri, "evaluate"):  # newest first
        params = run["params"]
        if "rules.name" not in params:
            earlier += 1
            continue
        if any(params[key] != str(value) for key, value in asked.items()):
            continue
        identity = {key: value for key, value in sorted(params.items()) if key not in OF_A_FOLD}
        method = methods.setdefault(tuple(identity.items()), Method(identity, {}))
        fold = params["fold"]
        if fold not in method.folds:
            method.folds[fold] = {key: round(run["metrics"][key], 6) for key in ("miou", "fb_iou")}
            method.checkpoints[fold] = params["checkpoint"]
        elif method.checkpoints[fold] != params["checkpoint"]:
            print(f"{params['method']}, fold {fold}: several checkpoints; the newest is shown", file=sys.stderr)
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


def _cell(miou: float, fb_iou: float) -> str:
    return f"{100 * miou:.1f} ({100 * fb_iou:.1f})"
