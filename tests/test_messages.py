"""What Ray writes itself goes to a file, and what was lost is said in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fsdino.errors import Fault
from pipelines import cluster, restarts
from tests.conftest import ROOT

SCRIPT = """
import os, sys, time
from pipelines import ray_messages
ray_messages.keep_terminal()
print("before", file=sys.stderr)
ray_messages.divert()
os.write(2, b"core_worker.cc:123 an essay\\n" if {essay} else b"")
print("behind", file=sys.stderr)
print(ray_messages.place(), ray_messages.said("essay"), flush=True)
{ending}
"""


def ran(tmp_path, essay, ending):
    script = SCRIPT.format(essay=essay, ending=ending)
    environ = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=60)
    path, said = done.stdout.split()
    assert said == str(essay)
    return done, Path(path)


@pytest.mark.parametrize("essay", [True, False])
def test_what_is_written_past_python_goes_to_a_file_that_stays_if_it_holds_anything(tmp_path, essay):
    done, path = ran(tmp_path, essay, "ray_messages.end()")
    assert done.returncode == 0 and done.stderr == "before\nbehind\n"
    assert path.parent == tmp_path and path.exists() == essay
    assert not essay or path.read_text() == "core_worker.cc:123 an essay\n"


LOGS = """
import logging
class Plain(logging.StreamHandler): pass
logging.getLogger("ray.data").addHandler(Plain())
ray_messages.divert_loggers()
logging.getLogger("ray.data").warning("of blocks and fallbacks")
ray_messages.end()
"""


def test_what_rays_loggers_say_goes_to_that_file_too(tmp_path):
    done, path = ran(tmp_path, False, LOGS)
    assert done.stderr == "before\nbehind\n" and path.read_text() == "of blocks and fallbacks\n"


@pytest.mark.parametrize(("ending", "code"), [("os._exit(1)", 1), ("os.kill(os.getpid(), 9)", -signal.SIGKILL)])
def test_a_process_that_is_ended_from_outside_leaves_one_line(tmp_path, ending, code):
    done, path = ran(tmp_path, True, ending)
    assert done.returncode == code
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: this command was killed, or Ray ended it because its head or this node is gone")
    assert str(path) in last and last.endswith("finished work is kept, rerun the command to resume")


def test_a_loss_of_workers_is_one_line_with_the_restarts_that_are_left():
    died = RuntimeError("The actor died.\nA long essay about what actors are.")
    line = restarts.failure({1: died, 0: died}, 2)
    assert line[9:] == "workers 0, 1 lost (The actor died.); 2 restarts left"
    assert restarts.failure({3: Fault("disk full")}, 1)[9:] == "worker 3 lost (disk full); 1 restart left"
    assert restarts.failure({3: died}, -1).endswith("no restart left")


def test_a_lost_node_is_one_line_with_what_it_had():
    node = {
        "NodeManagerHostname": "gpu-7",
        "NodeManagerAddress": "10.0.3.12",
        "NodeID": "4fd1a2b3c4",
        "Resources": {"CPU": 12.0, "GPU": 1.0, "memory": 1e9},
    }
    line = cluster.loss_of(node, "health check failed\n  due to missing too many heartbeats")
    assert line[9:] == (
        "node gpu-7 (10.0.3.12, 4fd1a2) with 12 CPU and 1 GPU lost "
        "(health check failed due to missing too many heartbeats)"
    )
