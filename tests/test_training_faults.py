"""Training whose workers, disk, object store or node fail in the middle."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from fsdino.segmenter import Segmenter
from pipelines import tracking
from tests.conftest import FOLD, ROOT, TRAINED, command, flags, result_of, stop_ray
from tests.servers import FaultProxy, aws, environment, free_port
from tests.test_faults import processes, small_disk
from tests.test_kills import kill, start, wait_for
from tests.test_two_nodes import RAY

pytestmark = pytest.mark.slow


def curve(places, name):
    """Every logged loss, as (step, value), and the run's status."""
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    experiment = client.get_experiment_by_name("train/shapes").experiment_id
    (one,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, "loss")], one.info.status


def weights(result):
    return Segmenter.load(result["checkpoint"])[0].state_dict()


def test_a_training_whose_worker_is_killed_20_times_has_the_undisturbed_curve(whole_run, places):
    stop_ray()
    steps = int(os.environ.get("FSDINO_STEPS", "1200"))
    line = [*flags(places), "--fold", FOLD, "--steps", steps, "--checkpoint-every", 10, "--no-register"]
    undisturbed = result_of(command("train_episodic", *line, "--name", "calm"))
    folder, rng, killed = Path(str(places["--out"])) / TRAINED / "killed-often", random.Random(0), 0
    process = start("train_episodic", *line, "--name", "killed-often", "--worker-failures", 20)
    while killed < 20 and process.poll() is None:
        newest = sorted(folder.glob("checkpoint_*/state.pt"))[-1:]
        grown = lambda before=newest: sorted(folder.glob("checkpoint_*/state.pt"))[-1:] != before  # noqa: E731
        if not wait_for(grown, process):
            break
        time.sleep(rng.uniform(0, 1.5))
        for worker in processes(process.pid, "ray::", "RayTrainWorker"):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
                killed += 1
    assert process.wait(600) == 0 and killed == 20
    resumed = result_of(command("train_episodic", *line, "--name", "killed-often", "--worker-failures", 20))
    (calm, _), (often, status) = curve(places, "calm"), curve(places, "killed-often")
    assert status == "FINISHED" and dict(often) == dict(calm) and set(dict(often)) == set(range(1, steps + 1))
    assert Counter(often).keys() == Counter(calm).keys(), "a step that was computed again came out otherwise"
    for key, value in weights(undisturbed).items():
        assert torch.equal(value, weights(resumed)[key])


def failed(done, *words):
    assert done.returncode == 1, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[0]


def test_a_training_onto_a_full_disk_says_so_and_resumes_when_there_is_space(whole_run, places, tmp_path):
    stop_ray()
    line = ["--fold", FOLD, "--steps", 60, "--checkpoint-every", 10, "--no-register", "--worker-failures", 0]
    line += ["--adapter-checkpoint", whole_run["distill"]["adapter"]]
    with small_disk(tmp_path / "disk", 40) as disk:
        (disk / "ballast").write_bytes(bytes(36_000_000))
        elsewhere = flags({**places, "--out": disk / "runs"})
        done = command("train_episodic", *elsewhere, *line, "--name", "full", check=False)
        failed(done, "No space left", "rerun to resume")
        assert not list(disk.rglob("final/segmenter.json"))
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        result = result_of(command("train_episodic", *elsewhere, *line, "--name", "full"))
        assert Path(result["checkpoint"]).is_dir()
        assert dict(curve(places, "full")[0]).keys() == set(range(1, 61))


def test_a_training_whose_object_store_dies_says_so_and_resumes_when_it_is_back(
    whole_run, places, s3_endpoint, tmp_path
):
    stop_ray()
    with environment(**aws(s3_endpoint)):
        for url in (*whole_run["features"]["stores"], *whole_run["bake"]["stores"]):
            name = "s3://features/dying/" + url.removeprefix(str(places["--store"])).strip("/")
            copy = [sys.executable, "-m", "feature_store", "copy", url, name]
            subprocess.run(copy, cwd=ROOT, check=True, capture_output=True)
    remote = {**places, "--store": "s3://features/dying", "--out": "s3://features/dying-runs"}
    adapter = ["--adapter-checkpoint", whole_run["distill"]["adapter"]]
    line = [*flags(remote), "--fold", FOLD, "--steps", 600, "--checkpoint-every", 20, "--worker-failures", 1, *adapter]
    line += ["--name", "dying", "--no-register"]
    with FaultProxy(s3_endpoint, share=0) as proxy, environment(**aws(proxy.address), FSDINO_STORE_TIMEOUT="0.5"):
        arguments = [sys.executable, "-m", "pipelines.train_episodic", *map(str, line)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        import fsspec

        fs = fsspec.filesystem("s3", skip_instance_cache=True)

        def checkpointed():
            fs.invalidate_cache()
            return fs.glob(f"features/dying-runs/{TRAINED}/dying/checkpoint_*/state.pt")

        assert wait_for(checkpointed, process)
        proxy.answer_all = 503
        out, said = process.communicate(timeout=300)
        failed(subprocess.CompletedProcess(arguments, process.returncode, out, said), "s3://features/dying", "rerun")
        proxy.answer_all = None
        result = result_of(command("train_episodic", *line))
    assert result["checkpoint"].startswith("s3://features/dying-runs")
    losses, status = curve(places, "dying")
    assert status == "FINISHED" and dict(losses).keys() == set(range(1, 601))


@contextmanager
def two_nodes():
    """A head and a node, one CPU each; a function that kills the second, and one that starts it again."""
    stop_ray()
    port, environ = free_port(), os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    alive: list[subprocess.Popen] = []

    def begin(*how):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        line = [RAY, "start", "--block", "--num-cpus=1", *how]
        alive.append(subprocess.Popen(line, env=environ, **quiet))
        return alive[-1]

    def join():
        return begin(f"--address=127.0.0.1:{port}")

    def wait_until(wanted):
        count = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        here = environ | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        for _ in range(30):
            listed = subprocess.run([sys.executable, "-c", count], env=here, capture_output=True, text=True)
            if listed.stdout.split()[-1:] == [str(wanted)]:
                return
            time.sleep(1)
        raise AssertionError(f"no cluster of {wanted} nodes: {listed.stderr[-2000:]}")

    def lose(node):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    try:
        begin("--head", f"--port={port}", "--include-dashboard=false")
        wait_until(1)
        second = join()
        wait_until(2)
        with environment(RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled"):
            yield second, lose, join
    finally:
        subprocess.run([RAY, "stop", "--force"], capture_output=True, env=environ, timeout=120)
        for node in alive:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def test_a_training_on_two_nodes_survives_the_loss_of_one(whole_run, places):
    line = [*flags(places), "--fold", FOLD, "--steps", 120, "--checkpoint-every", 10, "--no-register"]
    stop_ray()
    alone = result_of(command("train_episodic", *line, "--name", "one-node"))
    folder = Path(str(places["--out"])) / TRAINED / "two-nodes"
    shutil.rmtree(folder, ignore_errors=True)
    with two_nodes() as (second, lose, join):
        process = start("train_episodic", *line, "--name", "two-nodes", "--workers", 2)
        try:
            assert wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process)
            lose(second)
            time.sleep(3)
            assert process.poll() is None
            join()
            assert process.wait(300) == 0
        finally:
            with suppress(ProcessLookupError):
                kill(process)
    result = result_of(command("train_episodic", *line, "--name", "two-nodes"))
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    losses, status = curve(places, "two-nodes")
    assert status == "FINISHED" and Counter(step for step, _ in losses)[1] == 1
    assert dict(losses) == pytest.approx(dict(curve(places, "one-node")[0]), rel=1e-3)
