"""A table of the evaluations that MLflow holds: runs in, Markdown out.

    python -m pipelines.report --dataset pascal-5i

A row holds runs that differ in nothing but fold and checkpoint: one recipe, encoder, resolution, model, protocol, list
and seed. What differs otherwise has a row of its own, which says in what.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdino.errors import UserError
from pipelines.checks import Count, Few, Seed, TrackingUri
from pipelines.cli import main


@dataclass(frozen=True)
class Settings:
    """Print mIoU and FB-IoU of every method on every fold; the mean where all are there."""

    tracking_uri: TrackingUri = "sqlite:///outputs/mlflow.db"
    """MLflow: sqlite:///FILE or the http address of a server."""
    dataset: str = "pascal-5i"
    """Name of the data set."""
    shots: Few = 1
    """Supports per episode."""
    episodes: Count = 1000
    """Number of test episodes."""
    test_seed: Seed = 0
    """Seed of the test episodes."""


def job(settings: Settings) -> dict[str, Any]:
    """Gather, then print the table before the JSON line."""
    methods: dict[str, Any] = {}
    file = Path(settings.tracking_uri.removeprefix("sqlite:///"))
    if file.exists() or not settings.tracking_uri.startswith("sqlite:///"):
        from pipelines import tables

        methods = tables.gather(
            settings.tracking_uri,
            dataset=settings.dataset,
            shots=settings.shots,
            episodes=settings.episodes,
            test_seed=settings.test_seed,
        )
    if not methods:
        raise UserError(
            f"{settings.tracking_uri}: expected evaluations of {settings.dataset}, {settings.shots}-shot, "
            f"{settings.episodes} episodes of seed {settings.test_seed}, found none; run evaluate first"
        )
    print(tables.markdown(f"{settings.dataset}, {settings.shots}-shot", methods))
    return {
        "dataset": settings.dataset,
        "shots": settings.shots,
        "methods": {name: method.folds for name, method in methods.items()},
    }


if __name__ == "__main__":
    main(Settings, job)
