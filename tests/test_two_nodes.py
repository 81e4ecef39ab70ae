"""A cluster of two nodes on this machine that do not see the same folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, stop_ray
from tests.servers import environment, free_port

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def nodes(tmp_path):
    """The address of a cluster whose second node has a folder of its own in the place of `tmp_path`."""
    hidden = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have mounts of its own")
    stop_ray()
    port = free_port()
    environ = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}

    def start(*line):
        done = subprocess.run([*line], capture_output=True, text=True, env=environ, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        start(RAY, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false")
        join = f"mount -t tmpfs none {tmp_path} && {RAY} start --address=127.0.0.1:{port} --num-cpus=2"
        start(*hidden, join)
        with environment(RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled"):
            yield
    finally:
        subprocess.run([RAY, "stop", "--force"], capture_output=True, env=environ, timeout=120)


@pytest.mark.slow
def test_a_store_that_a_node_does_not_see_is_refused_before_any_work(nodes, shapes_root, tmp_path):
    line = [sys.executable, "-m", "pipelines.extract_features", "--recipe", "tiny", "--data", str(shapes_root)]
    line += ["--store", str(tmp_path / "stores"), "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "this path is not shared by all nodes" in error and "use s3:// or a shared file system" in error
    assert not list((tmp_path / "stores").rglob("markers/*"))
