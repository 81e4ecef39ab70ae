"""Fixtures, and the shape checks of every annotated function of `fsdino` and `feature_store`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.servers import aws, environment, s3_server

install_import_hook(["fsdino", "feature_store"], "beartype.beartype")

ROOT = Path(__file__).parents[1]
VOC = Path(os.environ.get("FSDINO_TEST_DATA", ROOT.parent / "shared" / "data")) / "VOCdevkit" / "VOC2012"


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


def command(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run a real command as a user does, from the checkout."""
    line = [sys.executable, "-m", f"pipelines.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(line)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The JSON object on the last line of stdout."""
    return json.loads(done.stdout.splitlines()[-1])
