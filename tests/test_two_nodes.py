"""A cluster of two nodes on this machine, the second with other folders, another code or another environment: what it
lacks is said in one line before any work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, stop_ray
from tests.servers import environment, free_port

RAY = str(Path(sys.executable).parent / "ray")
pytestmark = pytest.mark.slow


def end(processes):
    """Kill each process with all that it started, and no other Ray of this machine."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def two_nodes(first: str = "true", **changed: str):
    """A cluster, whose second node does something in mounts of its own before it starts, in an environment of its own.
    Yields a function that runs a command there."""
    hidden = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have mounts of its own")
    stop_ray()
    port, started = free_port(), []
    environ = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    try:
        head = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
        head += [f"--temp-dir=/tmp/fsdino-{port}"]  # no other Ray's, which would be joined unasked
        started.append(subprocess.Popen(head, env=environ, **quiet))
        joining = f"--address=127.0.0.1:{port} --num-cpus=2 --dashboard-agent-listen-port={free_port()}"
        join = f"{first} && exec {RAY} start --block {joining}"
        with environment(RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1"):
            wait_for_nodes(1)
            started.append(subprocess.Popen([*hidden, join], env=environ | changed, **quiet))
            wait_for_nodes(2)
            yield
    finally:
        end(started)
        shutil.rmtree(f"/tmp/fsdino-{port}", ignore_errors=True)


def wait_for_nodes(wanted):
    count = "import ray; ray.init(log_to_driver=False, logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"
    listed = None
    for _ in range(30):
        listed = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
        if listed.stdout.split()[-1:] == [str(wanted)]:
            return
        time.sleep(1)
    raise AssertionError(f"no cluster of {wanted} nodes: {listed.stderr[-2000:]}")


def refused(name, *line):
    """The one line that a command says and exits with 2."""
    words = [sys.executable, "-m", f"pipelines.{name}", *map(str, line)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    *others, error = [text for text in done.stderr.splitlines() if text.strip()]
    assert error.startswith("error: node ") and all(text.startswith("also: node ") for text in others), done.stderr
    return error


def extraction(shapes_root, tmp_path, store=None):
    places = ["--recipe", "tiny", "--data", shapes_root, "--store", store or tmp_path / "stores"]
    return [*places, "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]


def test_a_store_that_a_node_does_not_see_is_refused_before_any_work(shapes_root, tmp_path):
    with two_nodes(f"mount -t tmpfs none {tmp_path}"):
        error = refused("extract_features", *extraction(shapes_root, tmp_path))
    assert "this path is not shared by all nodes; use s3:// or a shared file system" in error
    assert not list((tmp_path / "stores").rglob("*.json")) and not (tmp_path / "m.db").exists()


def test_data_that_a_node_does_not_see_are_refused_before_any_work(shapes_root, tmp_path):
    with two_nodes(f"mount -t tmpfs none {shapes_root}"):
        error = refused("extract_features", *extraction(shapes_root, tmp_path))
    assert f"{shapes_root}" in error and "mount or copy it on every node" in error


def test_a_node_without_the_code_is_refused(shapes_root, tmp_path):
    with two_nodes(f"mount -t tmpfs none {ROOT}/fsdino"):
        error = refused("extract_features", *extraction(shapes_root, tmp_path))
    assert "expected this project to be importable there, found none" in error


def test_a_node_with_another_version_is_refused(shapes_root, tmp_path):
    shutil.copytree(ROOT / "pipelines", tmp_path / "older")
    (tmp_path / "older" / "heap.py").write_text("")
    with two_nodes(f"mount --bind {tmp_path}/older {ROOT}/pipelines"):
        error = refused("extract_features", *extraction(shapes_root, tmp_path))
    assert "expected the driver's code" in error and "bring the same commit or image to every node" in error


def test_a_node_without_credentials_is_refused(shapes_root, tmp_path, s3_endpoint):
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    with two_nodes(**nobody, HOME=str(tmp_path)):
        error = refused("extract_features", *extraction(shapes_root, tmp_path, "s3://features/unknown"))
    assert "expected credentials for S3, found none" in error and "before `ray start` there" in error
