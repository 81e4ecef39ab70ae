"""A table of the evaluations that MLflow holds: runs in, Markdown out.

    python -m pipelines.report --recipe offline --dataset pascal-5i

A row holds runs that differ in nothing but fold and checkpoint: one recipe, encoder, resolution, model, protocol, list
and seed. What differs otherwise has a row of its own, which says in what.
"""

from dataclasses import dataclass
from typing import Any

from pipelines import tables
from pipelines.cli import main
from pipelines.recipes import Places, RecipeName


@dataclass(frozen=True)
class Settings:
    """Print mIoU and FB-IoU of every method on every fold; the mean where all are there."""

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
    methods = tables.gather(
        settings.places.tracking_uri,
        dataset=settings.dataset,
        shots=settings.shots,
        episodes=settings.episodes,
        test_seed=settings.test_seed,
    )
    print(tables.markdown(f"{settings.dataset}, {settings.shots}-shot", methods))
    return {
        "dataset": settings.dataset,
        "shots": settings.shots,
        "methods": {name: method.folds for name, method in methods.items()},
    }


if __name__ == "__main__":
    main(Settings, job)
