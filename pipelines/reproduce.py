"""A whole study with one command: features, distillation, training and scores of every fold, and the table.

    python -m pipelines.reproduce --recipe offline --folds 0 1 2 3 --shots 1 5 --variants compact 4d

Runs what is not done yet, in order, in one process on one Ray; killed, the same command resumes. The log of all steps
is `reproduce.log` beside the runs.
Cost: the offline recipe on VOC, four folds, 1-shot, took about two hours on two cores.
"""

import sys
from pathlib import Path
from typing import Any

from feature_store.urls import local_path
from fsdino.errors import UserError
from pipelines import datasets, sequence, tables
from pipelines.checks import check_batch
from pipelines.cli import main
from pipelines.sequence import Study as Settings


def job(settings: Settings) -> dict[str, Any]:
    """Check what can be checked, run the steps, then print a table for each number of shots."""
    dataset = datasets.dataset_of(settings.places)
    for fold in settings.folds:
        dataset.novel(fold)
    if not settings.folds or not settings.shots:
        raise UserError(f"--folds {settings.folds}, --shots {settings.shots}: expected at least one fold and one shot")
    check_batch(settings.episodic.batch, settings.workers.workers)
    log = Path(local_path(settings.places.out) or "outputs") / "reproduce.log"
    print(f"log of all steps: {log}", file=sys.stderr)
    results = sequence.run(settings, sequence.plan(settings), log)
    sequence.stop_ray()
    scores = {}
    for shots in settings.shots:
        methods: dict[str, tables.Method] = {}
        for result in results.values():
            if "miou" in result and result["shots"] == shots:
                method = methods.setdefault(result["variant"], tables.Method({}, {}))
                method.folds[str(result["fold"])] = {key: round(result[key], 6) for key in ("miou", "fb_iou")}
        print(tables.markdown(f"{dataset.name}, {shots}-shot", methods, len(dataset.folds)) + "\n")
        scores[f"{shots}-shot"] = {name: method.folds for name, method in methods.items()}
    return {"dataset": dataset.name, "scores": scores}


if __name__ == "__main__":
    main(Settings, job)
