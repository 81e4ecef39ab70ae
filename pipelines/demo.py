"""The whole way on generated data, in minutes on two cores: every step is a command that you can run yourself.

    make demo          # or: python -m pipelines.demo

Writes shapes, extracts features, distils, bakes, trains both variants and scores them with the training-free
prototype on classes none of them saw. Everything lands in one folder; the log of every command is in `demo.log`.
"""

import io
import json
import runpy
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
from tqdm import tqdm

from fsdino.errors import UserError
from pipelines.cli import main
from pipelines.stages import connect

RES_PX, COARSE_PX = 256, 128
METHODS = ("prototype", "compact", "4d")


@dataclass(frozen=True)
class Settings:
    """Run the whole pipeline on generated data and show its scores on novel classes."""

    out: str = "outputs/demo"
    """Folder for data, stores, runs, pictures and the log."""
    fold: int = 0
    """The fold whose classes are kept for the test: 0 to 3."""
    shots: int = 1
    """Supports in a test episode."""
    images: int = 280
    """Generated images."""
    steps: int = 160
    """Training steps of each variant."""
    episodes: int = 160
    """Test episodes."""


def job(settings: Settings) -> dict[str, Any]:
    """Run the commands one after the other on one local Ray, then print the table."""
    started = time.perf_counter()
    out = Path(settings.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    tracking_uri = f"sqlite:///{out / 'mlflow.db'}"
    plan = commands(settings, out, tracking_uri)
    connect()
    results: dict[str, dict[str, Any]] = {}
    with open(out / "demo.log", "w") as log, tqdm(plan.items(), unit="step", file=sys.stderr) as bar:
        for title, (name, arguments) in bar:
            bar.set_description(title)
            results[title] = run_command(name, arguments, log)
    ray.shutdown()
    scores = {m: {k: results[f"score {m}"][k] for k in ("miou", "fb_iou")} for m in METHODS}
    print(f"\nfold {settings.fold}, {settings.shots}-shot, {settings.episodes} episodes on novel classes:\n")
    print(f"{'method':<24}{'mIoU':>8}{'FB-IoU':>8}")
    for name, title in zip(METHODS, ("training-free prototype", "compact model", "4D model"), strict=True):
        print(f"{title:<24}{scores[name]['miou']:>8.3f}{scores[name]['fb_iou']:>8.3f}")
    print(f"\npictures: {out / 'panel.png'}")
    print(
        f"runs and models: {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {tracking_uri} --port 5000\n"
    )
    return {
        "fold": settings.fold,
        "shots": settings.shots,
        **scores,
        "panel": str(out / "panel.png"),
        "tracking_uri": tracking_uri,
        "seconds": round(time.perf_counter() - started, 1),
    }


def run_command(name: str, arguments: list[str], log: TextIO) -> dict[str, Any]:
    """What `python -m pipelines.NAME ARGUMENTS` does, in this process: its imports and its Ray serve all commands.

    Its output goes to the log; returns the JSON object of its last line.
    """
    log.write(f"\n$ python -m pipelines.{name} {' '.join(arguments)}\n")
    said, own = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with redirect_stdout(said), redirect_stderr(log):
            runpy.run_module(f"pipelines.{name}", run_name="__main__", alter_sys=True)
    except SystemExit:  # with code 2: the reason is the last line that it wrote
        log.flush()
        raise UserError(Path(log.name).read_text().splitlines()[-1].removeprefix("error: ")) from None
    finally:
        sys.argv = own
        log.write(said.getvalue())
        log.flush()
    return json.loads(said.getvalue().splitlines()[-1])


def commands(settings: Settings, out: Path, tracking_uri: str) -> dict[str, tuple[str, list[str]]]:
    """Title, command and arguments of every step."""
    data = str(out / "shapes")
    places = [
        "--data",
        data,
        "--store",
        str(out / "stores"),
        "--out",
        str(out / "runs"),
        "--tracking-uri",
        tracking_uri,
    ]
    common = ["--recipe", "offline", *places, "--res", str(RES_PX), "--num-views", "1"]
    fold = ["--fold", str(settings.fold)]
    test = [*fold, "--shots", str(settings.shots), "--episodes", str(settings.episodes)]

    def command(name: str, *arguments: str) -> tuple[str, list[str]]:
        return name, list(arguments)

    plan = {
        "generate images": command("generate_shapes", "--data", data, "--images", str(settings.images)),
        "teacher embeddings": command("extract_teacher", *common),
        "features": command("extract_features", *common, "--coarse-res", str(COARSE_PX)),
        "distil": command("distill", *common, "--distill-res", str(COARSE_PX), str(RES_PX), "--distill-epochs", "3"),
        "bake embeddings": command("bake_embeddings", *common),
    }
    for variant in ("compact", "4d"):
        steps = ["--steps", str(settings.steps), "--variant", variant]
        plan[f"train {variant}"] = command("train_episodic", *common, *fold, *steps)
    plan["score prototype"] = command("evaluate", *common, *test, "--method", "prototype")
    plan["score compact"] = command("evaluate", *common, *test, "--variant", "compact")
    plan["score 4d"] = command("evaluate", *common, *test, "--variant", "4d", "--panel", str(out / "panel.png"))
    return plan


if __name__ == "__main__":
    main(Settings, job)
