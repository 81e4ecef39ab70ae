"""Fixtures, and the shape checks of every annotated function of `fsdino` and `feature_store`."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from tests.servers import aws, environment, s3_server

install_import_hook(["fsdino", "feature_store"], "beartype.beartype")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FSDINO_TEST_DATA", ROOT.parent / "shared" / "data"))
VOC = DATA / "VOCdevkit" / "VOC2012"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the end-to-end tests, which share results and one Ray."""
    for item in items:
        if "whole_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.commands)


@pytest.fixture
def voc_root() -> Path:
    if not VOC.is_dir():
        pytest.skip(f"the VOC photographs are not at {VOC}; set FSDINO_TEST_DATA to their folder")
    return VOC


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """160 generated images of 224 px: enough for every class of every fold."""
    from fsdino.data.shapes import write_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 160, seed=1, side_px=224)
    return root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    os.environ["FSDINO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def s3_endpoint():
    """A real S3 server with an empty bucket `features`, and the environment that leads there."""
    with s3_server() as address, environment(**aws(address)):
        import fsspec

        fsspec.filesystem("s3").mkdir("features")
        yield address


def run(name: str, *arguments: object) -> dict[str, Any]:
    """What a command returns with these arguments, in this process; its errors are raised. All share one Ray."""
    from pipelines import cli

    module = importlib.import_module(f"pipelines.{name}")
    if name == "train_episodic" and "--model-name" not in arguments:  # it takes ten seconds
        arguments = (*arguments, "--no-register")
    return cli.call(module.Settings, module.job, [str(a) for a in arguments])


@pytest.fixture(scope="session", autouse=True)
def one_ray():
    """The Ray that commands in this process share; it ends with the tests, or earlier by `stop_ray`."""
    yield
    stop_ray()


def stop_ray() -> None:
    """End this process's Ray: before a command in a process of its own starts another."""
    from pipelines import sequence

    sequence.stop_ray()


def command(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run a real command as a user does, from the checkout."""
    line = [sys.executable, "-m", f"pipelines.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(line)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


@pytest.fixture(scope="session")
def places(tmp_path_factory, shapes_root) -> dict[str, object]:
    """Where the whole way with the tiny recipe lies, as flags."""
    base = tmp_path_factory.mktemp("run")
    return {
        "--recipe": "tiny",
        "--data": shapes_root,
        "--store": base / "stores",
        "--out": base / "runs",
        "--tracking-uri": f"sqlite:///{base / 'mlflow.db'}",
    }


def flags(places: dict[str, object], *names: str) -> list[object]:
    """Places as arguments: all, or those of these names."""
    chosen = places if not names else {n: places[n] for n in names}
    return [part for pair in chosen.items() for part in pair]


FOLD = 1
TRAINED = "shapes/tiny_vit@70"
"""The folder of the tiny recipe's runs below --out."""


@pytest.fixture(scope="session")
def whole_run(places) -> dict[str, dict[str, Any]]:
    """Every command once; title to result."""
    everywhere, fold = flags(places), ["--fold", FOLD]
    # Ray's workers have working folders of their own, so a relative path must not mean one there.
    here = {k: os.path.relpath(v) if k in ("--data", "--store", "--out") else v for k, v in places.items()}
    two = ["--workers", 2, "--worker-cpus", 0.5]
    results = {
        "teacher": run("extract_teacher", *everywhere),
        "features": run("extract_features", *everywhere, "--coarse-res", 28),
        "distill": run("distill", *everywhere, *two),
        "bake": run("bake_embeddings", *everywhere),
        "4d": run("train_episodic", *everywhere, *fold, "--model-name", "shapes-4d"),
        "compact": run("train_episodic", *flags(here), *fold, "--variant", "compact"),
    }
    for method in ("prototype", "nearest"):
        results[f"score {method}"] = run("evaluate", *everywhere, *fold, "--method", method)
    for variant in ("compact", "4d"):
        results[f"score {variant}"] = run("evaluate", *everywhere, *fold, "--variant", variant)
    return results


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The JSON object on the last line of stdout."""
    return json.loads(done.stdout.splitlines()[-1])
