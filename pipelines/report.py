"""A table of all evaluations that MLflow holds, newest of each setting: runs in, Markdown out.

python -m pipelines.report --recipe offline --dataset pascal-5i
"""

from dataclasses import dataclass
from typing import Any

from pipelines import tracking
from pipelines.cli import main
from pipelines.recipes import Places, RecipeName

FOLDS = ("0", "1", "2", "3")


@dataclass(frozen=True)
class Settings:
    """Print mIoU and FB-IoU of every method on every fold; the mean where all four are there."""

    recipe: RecipeName
    places: Places
    dataset: str = "pascal-5i"
    """Data set of the evaluations."""
    shots: int = 1
    """Their number of supports."""
    episodes: int = 1000
    """Their number of episodes."""
    test_seed: int = 0
    """Their seed."""


def job(settings: Settings) -> dict[str, Any]:
    """Gather, then print the table before the JSON line."""
    table = gather(settings)
    print(f"| {settings.dataset}, {settings.shots}-shot, mIoU (FB-IoU) | fold 0 | fold 1 | fold 2 | fold 3 | mean |")
    print("|---|---|---|---|---|---|")
    for method, folds in sorted(table.items(), key=lambda entry: _mean(entry[1], "miou")):
        cells = [_cell(folds[f]["miou"], folds[f]["fb_iou"]) if f in folds else "-" for f in FOLDS]
        cells.append(_cell(_mean(folds, "miou"), _mean(folds, "fb_iou")) if len(folds) == len(FOLDS) else "-")
        print(f"| {method} | {' | '.join(cells)} |")
    return {"dataset": settings.dataset, "shots": settings.shots, "methods": table}


def gather(settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """method to fold to its newest scores."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for run in tracking.runs(settings.places.tracking_uri, "evaluate"):
        params = run["params"]
        asked = {key: str(getattr(settings, key)) for key in ("shots", "episodes", "test_seed")}
        if run["tags"].get("dataset") != settings.dataset or any(params.get(k) != v for k, v in asked.items()):
            continue
        scores = {key: round(run["metrics"][key], 6) for key in ("miou", "fb_iou")}
        table.setdefault(params["method"], {}).setdefault(params["fold"], scores)
    return table


def _cell(miou: float, fb_iou: float) -> str:
    return f"{100 * miou:.1f} ({100 * fb_iou:.1f})"


def _mean(folds: dict[str, dict[str, float]], key: str) -> float:
    return sum(scores[key] for scores in folds.values()) / len(folds)


if __name__ == "__main__":
    main(Settings, job)
