"""A whole study with one command: features, distillation, training and scores of every fold, and the table.

    python -m pipelines.reproduce --recipe offline --folds 0 1 2 3 --shots 1 5 --variants compact 4d
    python -m pipelines.reproduce --table 2 --data COCO             # all that a table of the paper still lacks
    python -m pipelines.reproduce --table 3 --data COCO --fss FSS-1000 --davis DAVIS
    python -m pipelines.reproduce --recipe offline --ablate --folds 0 2 --train-seeds 2    # what each switch is worth

Runs what is not done yet, in order, in one process on one Ray; killed, the same command resumes. The log of all steps
is `reproduce.log` beside the runs.
Cost: the offline recipe on VOC takes two cores half an hour for features and adapter, and 14 minutes for each model.
"""

import sys
from pathlib import Path
from typing import Any

from feature_store.urls import local_path
from fsdino.data.dataset import open_dataset
from fsdino.errors import UserError
from pipelines import ablation, datasets, sequence, tables
from pipelines.checks import check_batch
from pipelines.cli import main
from pipelines.sequence import Study as Settings


def job(settings: Settings) -> dict[str, Any]:
    """Check what can be checked, run the steps, then print a table for each number of shots."""
    settings = sequence.asked(settings)
    dataset = datasets.dataset_of(settings.places)
    wanted = {1: "pascal-5i", 2: "coco-20i"}.get(settings.table or 0, dataset.name)
    if dataset.name != wanted:
        raise UserError(f"--table {settings.table}: expected {wanted} at --data, got {dataset.name}")
    for _, kind, place in sequence.TRANSFER:
        if settings.table == 3 and getattr(settings, place) is not None:
            open_dataset(getattr(settings, place), kind)
    for fold in settings.folds:
        dataset.novel(fold)
    if not settings.folds or not settings.shots:
        raise UserError(f"--folds {settings.folds}, --shots {settings.shots}: expected at least one fold and one shot")
    check_batch(settings.episodic.batch, settings.workers.workers, settings.episodic.accumulate)
    log = Path(local_path(settings.places.out) or "outputs") / "reproduce.log"
    print(f"log of all steps: {log}", file=sys.stderr)
    results = sequence.run(settings, sequence.plan(settings), log)
    sequence.stop_ray()
    if settings.ablate:
        tried = ablation.scores_of(sequence.trials_of(settings), results)
        print("\n".join(ablation.table(tried)))
        return {"dataset": dataset.name, "ablation": tried}
    scores = {}
    for shots in settings.shots:
        methods: dict[str, tables.Method] = {}
        for result in results.values():
            if "miou" in result and result["shots"] == shots and result["dataset"] == dataset.name:
                method = methods.setdefault(result["variant"], tables.Method({}))
                method.folds[str(result["fold"])] = {
                    str(of["seed"]): {key: round(of[key], 6) for key in ("miou", "fb_iou")}
                    for of in result.get("seeds", [result])
                }
        if not methods:
            continue
        table = tables.scores(f"{dataset.name}, {shots}-shot", methods, len(dataset.folds))
        print(tables.markdown(table) + "\n")
        scores[f"{shots}-shot"] = {name: method.folds for name, method in methods.items()}
    transfer = {
        title: {key: result[key] for key in ("miou", "fb_iou", "j", "f", "j_and_f") if key in result}
        for title, result in results.items()
        if result.get("dataset") not in (None, dataset.name)
    }
    for title, found in transfer.items():
        print(f"{title}: {', '.join(f'{key} {100 * value:.1f}' for key, value in found.items())}")
    return {"dataset": dataset.name, "scores": scores, "transfer": transfer}


if __name__ == "__main__":
    main(Settings, job)
