"""Training that is stopped, moved, split otherwise, or asked for all folds at once."""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fsdino.segmenter import Segmenter
from pipelines import tracking
from tests.conftest import FOLD, ROOT, TRAINED, flags, run, stop_ray
from tests.test_kills import kill, start, wait_for


def logged(places, name):
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    experiment = client.get_experiment_by_name("train/shapes").experiment_id
    return client, client.search_runs([experiment], f"attributes.run_name = '{name}'")


def checkpoints(folder):
    return sorted(folder.glob("checkpoint_*/state.pt"))


def same(one, other, rtol=1e-5, atol=1e-6):
    for key, value in Segmenter.load(one["checkpoint"])[0].state_dict().items():
        torch.testing.assert_close(
            value, Segmenter.load(other["checkpoint"])[0].state_dict()[key], rtol=rtol, atol=atol
        )


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_all_its_steps_kept(number, code, whole_run, places):
    name = f"stopped-{code}"
    line = ["train_episodic", *flags(places), "--fold", FOLD, "--steps", 300, "--checkpoint-every", 40, "--name", name]
    line += ["--checkpoints-kept", 3, "--no-register"]
    folder = Path(str(places["--out"])) / TRAINED / name
    stop_ray()
    command = [sys.executable, "-m", f"pipelines.{line[0]}", *map(str, line[1:])]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert wait_for(lambda: len(checkpoints(folder)) >= 1, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code and "stopped; rerun the command to resume" in said and "Traceback" not in said
    step = torch.load(checkpoints(folder)[-1])["step"]
    assert step % 10 == 0 and step < 300 and not (folder / "final").exists()
    client, (stopped,) = logged(places, name)
    assert stopped.info.status == "KILLED"
    run(line[0], *line[1:])
    client, (resumed,) = logged(places, name)
    assert resumed.info.status == "FINISHED" and len(checkpoints(folder)) <= 3
    steps = Counter(m.step for m in client.get_metric_history(resumed.info.run_id, "loss"))
    assert steps == dict.fromkeys(range(1, 301), 1), "a step was lost, or computed twice"


@pytest.mark.slow
def test_minutes_make_checkpoints_too(whole_run, places):
    minutes = ["--checkpoint-every", 10**6, "--checkpoint-minutes", 0.01, "--steps", 60, "--name", "minutes"]
    run("train_episodic", *flags(places), "--fold", FOLD, *minutes)
    found = checkpoints(Path(str(places["--out"])) / TRAINED / "minutes")
    assert found and all(torch.load(path)["step"] % 10 == 0 for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["workers", "folder"])
def test_an_interrupted_training_resumes_with_other_workers_and_in_another_folder(change, whole_run, places, tmp_path):
    undisturbed, name = whole_run["4d"], f"interrupted-{change}"
    often = ["--fold", FOLD, "--checkpoint-every", 2, "--name", name]
    often += ["--adapter-checkpoint", whole_run["distill"]["adapter"]]  # it stays where it is
    folder = Path(str(places["--out"])) / TRAINED / name
    process = start("train_episodic", *flags(places), *often)
    assert wait_for(lambda: len(checkpoints(folder)) >= 2, process)
    kill(process)
    assert not (folder / "final").exists()
    elsewhere = dict(places)
    if change == "folder":
        elsewhere["--out"] = tmp_path / "moved"
        (tmp_path / "moved" / TRAINED).mkdir(parents=True)
        shutil.move(folder, tmp_path / "moved" / TRAINED / name)
    else:
        often += ["--workers", 2, "--worker-cpus", 0.5]
    resumed = run("train_episodic", *flags(elsewhere), *often)
    assert resumed["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6 if change == "folder" else 2e-4)
    if change == "folder":
        same(undisturbed, resumed)
    client, (one,) = logged(places, name)
    steps = Counter(m.step for m in client.get_metric_history(one.info.run_id, "loss"))
    assert steps[1] == 1, "step 1 was logged twice: the run started over"


@pytest.mark.slow
def test_a_training_resumed_on_one_worker_equals_the_undisturbed_one_bit_for_bit(whole_run, places):
    often = ["--fold", FOLD, "--checkpoint-every", 2, "--ema", 0.9]
    undisturbed = run("train_episodic", *flags(places), *often, "--name", "whole")
    folder = Path(str(places["--out"])) / TRAINED / "twice"
    process = start("train_episodic", *flags(places), *often, "--name", "twice")
    assert wait_for(lambda: len(checkpoints(folder)) >= 2, process)
    kill(process)
    same(undisturbed, run("train_episodic", *flags(places), *often, "--name", "twice"), rtol=0, atol=0)


@pytest.mark.slow
def test_one_two_and_four_workers_have_the_same_losses(whole_run, places):
    found = {}
    for workers in (1, 2, 4):
        name, split = f"of-{workers}", ["--workers", workers, "--worker-cpus", 0.5]
        run("train_episodic", *flags(places), "--fold", FOLD, *split, "--name", name)
        client, (one,) = logged(places, name)
        found[workers] = [m.value for m in client.get_metric_history(one.info.run_id, "loss")]
    assert found[2] == pytest.approx(found[1], rel=2e-4) and found[4] == pytest.approx(found[1], rel=2e-4)


@pytest.mark.slow
def test_all_folds_train_at_once_below_a_run_that_sums_them_up(whole_run, places):
    validation = ["--select-on", "base", "--validation-classes", 1, "--validate-every", 10, "--validation-episodes", 8]
    line = ["--fold", "all", "--name", "study", *validation]
    before = run("train_episodic", *flags(places), "--fold", 2, "--name", "study-fold2", *validation)
    result = run("train_episodic", *flags(places), *line)
    assert list(result["folds"]) == ["0", "1", "2", "3"] and result["folds"]["2"] == before
    scores = [fold["best_val_miou"] for fold in result["folds"].values()]
    assert result["best_val_miou"] == pytest.approx(sum(scores) / 4)
    (above,) = logged(places, "study")[1]
    assert above.data.metrics["best_val_miou"] == pytest.approx(result["best_val_miou"])
    assert above.info.status == "FINISHED" and above.data.params["backbone.encoder"] == "tiny_vit"
    assert "fold" not in above.data.params
    for fold, of in result["folds"].items():
        (below,) = logged(places, f"study-fold{fold}")[1]
        assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert below.data.params["fold"] == fold and Path(of["checkpoint"]).is_dir()
    assert run("train_episodic", *flags(places), *line) == result
    assert len(logged(places, "study")[1]) == 1
