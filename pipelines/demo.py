"""The whole pipeline on generated data, in minutes on two cores: every step is a command that you can run yourself.

    make demo          # or: python -m pipelines.demo

Writes shapes, extracts features, distils, bakes, trains both variants and scores them with the training-free
prototype on classes none of them saw. Everything lands in one folder; the log of every command is in `demo.log`.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdino.errors import UserError
from pipelines import sequence
from pipelines.checks import Count, Few, Fold, Folder, Seed
from pipelines.cli import main
from pipelines.recipes import demo_recipe
from pipelines.sequence import Step, Study, score_title


@dataclass(frozen=True)
class Settings:
    """Run the whole pipeline on generated data and show its scores on novel classes."""

    out: Folder = "outputs/demo"
    """Folder for data, stores, runs, pictures and the log."""
    fold: Fold = 0
    """The fold whose classes are kept for the test: 0 to 3."""
    shots: Few = 1
    """Supports in a test episode."""
    images: Count = 280
    """Generated images."""
    steps: Count = 160
    """Training steps of each variant."""
    episodes: Count = 160
    """Test episodes."""
    seed: Seed = 0
    """Seed of the images, of distillation and of training."""


def job(settings: Settings) -> dict[str, Any]:
    """Run the commands one after the other on one local Ray, then print the table."""
    if settings.fold > 3:
        raise UserError(f"--fold {settings.fold}: expected 0 to 3")
    started = time.perf_counter()
    out = Path(settings.out).absolute()
    study, panel = study_of(settings, out), out / "panel.png"
    data = {"data": study.places.data, "images": settings.images, "seed": settings.seed}
    steps = [Step("generate images", "generate_shapes", lambda _: data), *sequence.plan(study)]
    last = steps.pop()
    steps.append(replace(last, own=lambda results: {**last.own(results), "panel": str(panel)}))
    results = sequence.run(study, steps, out / "demo.log")
    sequence.stop_ray()
    rows = {"prototype": "training-free prototype", "compact": "compact model", "4d": "4D model"}
    scores = {
        name: {k: results[score_title(name, settings.fold, settings.shots)][k] for k in ("miou", "fb_iou")}
        for name in rows
    }
    print(f"\nfold {settings.fold}, {settings.shots}-shot, {settings.episodes} episodes on novel classes:\n")
    print(f"{'method':<24}{'mIoU':>8}{'FB-IoU':>8}")
    for name, title in rows.items():
        print(f"{title:<24}{scores[name]['miou']:>8.3f}{scores[name]['fb_iou']:>8.3f}")
    uri = study.places.tracking_uri
    print(f"\npictures: {panel}")
    print(f"runs and models: {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri} --port 5000")
    print("                 http://127.0.0.1:5000/#/experiments?workflowType=machine_learning\n")
    return {
        "fold": settings.fold,
        "shots": settings.shots,
        **scores,
        "panel": str(panel),
        "tracking_uri": uri,
        "seconds": round(time.perf_counter() - started, 1),
    }


def study_of(settings: Settings, out: Path) -> Study:
    """The demo's recipe on the generated images."""
    recipe = demo_recipe()
    places = replace(
        recipe.places,
        data=str(out / "shapes"),
        store=str(out / "stores"),
        out=str(out / "runs"),
        tracking_uri=f"sqlite:///{out / 'mlflow.db'}",
    )
    return Study(
        recipe="demo",
        places=places,
        photographs=recipe.photographs,
        backbone=recipe.backbone,
        teaching=recipe.teaching,
        extraction=recipe.extraction,
        workers=replace(recipe.workers, seed=settings.seed),
        device=recipe.device,
        distillation=recipe.distillation,
        model=recipe.model,
        benchmark=recipe.benchmark,
        episodic=replace(recipe.episodic, steps=settings.steps),
        testing=replace(recipe.testing, episodes=settings.episodes),
        folds=(settings.fold,),
        shots=(settings.shots,),
        variants=("compact", "4d"),
        methods=("prototype",),
    )


if __name__ == "__main__":
    main(Settings, job)
