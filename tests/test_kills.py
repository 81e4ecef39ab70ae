"""Training that is killed resumes, and ends where an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fsdino.segmenter import Segmenter
from pipelines import tracking
from tests.conftest import FOLD, ROOT, TRAINED, flags, run, stop_ray


# Ray's processes outlive a killed driver for a while, so a whole session of processes is killed, as a lost node would.
def start(name, *arguments):
    stop_ray()
    line = [sys.executable, "-m", f"pipelines.{name}", *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 20):
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def test_training_resumes_after_kill_9_and_ends_at_the_undisturbed_loss(whole_run, places):
    undisturbed = whole_run["4d"]
    often = ["--fold", FOLD, "--checkpoint-every", 2]  # of ten steps; each checkpoint takes a fifth of a second
    folder = Path(places["--out"]) / TRAINED / "killed"
    process = start("train_episodic", *flags(places), *often, "--name", "killed")
    # Ray resumes from its snapshot, which follows the first checkpoint and precedes the second.
    twice = wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process)
    assert twice, "it ended before it could be killed"
    kill(process)
    assert not (folder / "final").exists()
    resumed = run("train_episodic", *flags(places), *often, "--name", "killed")
    assert resumed["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6)
    one, other = (Segmenter.load(r["checkpoint"])[0].state_dict() for r in (undisturbed, resumed))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)
    client = tracking.MlflowClient(places["--tracking-uri"])
    runs = client.search_runs([client.get_experiment_by_name("train/shapes").experiment_id], "run_name = 'killed'")
    (logged,) = [r for r in runs if r.data.tags.get("mlflow.runName") == "killed"]
    steps = Counter(m.step for m in client.get_metric_history(logged.info.run_id, "loss"))
    assert set(steps) == set(range(1, 11))
    assert steps[1] == 1, "step 1 was logged twice: the run started over"
    assert logged.info.status == "FINISHED"


@pytest.mark.slow
def test_distillation_resumes_after_kill_9_and_ends_at_the_undisturbed_adapter(whole_run, places, tmp_path):
    one, other = ({**places, "--out": tmp_path / name} for name in ("undisturbed", "killed"))
    longer = ["--distill-epochs", 4]
    undisturbed = run("distill", *flags(one), *longer)
    folder = tmp_path / "killed" / "adapters" / "tiny_vit@70" / "tiny_sam-on-shapes"
    process = start("distill", *flags(other), *longer)
    assert wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process)
    kill(process)
    resumed = run("distill", *flags(other), *longer)
    for a, b in zip(undisturbed["stages"], resumed["stages"], strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-5)


@pytest.mark.slow
def test_every_switch_of_training_survives_a_kill_and_parts_make_the_same_step(whole_run, places):
    switches = ["--fold", FOLD, "--ema", 0.9, "--clip", 1.0, "--checkpoint-every", 2]
    undisturbed = run("train_episodic", *flags(places), *switches, "--name", "switches")
    threads = ["--accumulate", 2, "--feed-threads", 3, "--feed-depth", 4, "--train-compile"]
    folder = Path(places["--out"]) / TRAINED / "switches-killed"
    process = start("train_episodic", *flags(places), *switches, *threads, "--name", "switches-killed")
    assert wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process, seconds=400)
    kill(process)
    resumed = run("train_episodic", *flags(places), *switches, *threads, "--name", "switches-killed")
    assert resumed["loss"] == pytest.approx(undisturbed["loss"], rel=1e-3)
    one, other = (Segmenter.load(r["checkpoint"])[0].state_dict() for r in (undisturbed, resumed))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=2e-2, atol=2e-3)
    plain = Segmenter.load(whole_run["4d"]["checkpoint"])[0].state_dict()
    assert any(not torch.allclose(value, plain[key], atol=1e-3) for key, value in one.items())
