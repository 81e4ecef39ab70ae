"""A whole study with one command: features, distillation, training and scores of every fold, and the table.

    python -m pipelines.reproduce --recipe offline --folds 0 1 2 3 --shots 1 5 --variants compact 4d

Runs what is not done yet, in order, in one process on one Ray; killed, the same command resumes. The log of all steps
is `reproduce.log` beside the runs.
Cost: the offline recipe on VOC took about three hours on two cores (docs/benchmarks/startup.md has each step's start).
"""

import sys
from pathlib import Path
from typing import Any

from feature_store.urls import local_path
from fsdino.data.dataset import open_dataset
from pipelines import sequence, tables
from pipelines.cli import main
from pipelines.sequence import Study as Settings


def job(settings: Settings) -> dict[str, Any]:
    """Run the steps, then print a table for each number of shots."""
    places, testing = settings.places, settings.testing
    dataset = open_dataset(places.data).name
    log = Path(local_path(places.out) or "outputs") / "reproduce.log"
    print(f"log of all steps: {log}", file=sys.stderr)
    sequence.run(settings, sequence.plan(settings), log)
    sequence.stop_ray()
    scores = {}
    for shots in settings.shots:
        methods = tables.gather(
            places.tracking_uri, dataset=dataset, shots=shots, episodes=testing.episodes, test_seed=testing.test_seed
        )
        print(tables.markdown(f"{dataset}, {shots}-shot", methods) + "\n")
        scores[f"{shots}-shot"] = {name: method.folds for name, method in methods.items()}
    return {"dataset": dataset, "scores": scores}


if __name__ == "__main__":
    main(Settings, job)
