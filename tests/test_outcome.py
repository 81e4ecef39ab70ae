"""Ray's own breakdowns are one line; errors of our code stay what they are."""

import json
import pickle
from types import SimpleNamespace

import pytest
import ray.train
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from feature_store import StoreError, StoreFault
from fsdino.errors import DataError, Fault, UserError
from pipelines import training
from pipelines.outcome import ClusterFault, Outcome
from pipelines.runs import ScoreFile

RUN = "s3://bucket/runs/fold1"


@pytest.mark.parametrize("lost", [NodeDiedError("the node\nwent away"), OutOfMemoryError("4 GB\nof memory")])
def test_workers_that_ray_lost_are_a_fault_of_one_line(lost):
    with pytest.raises(ClusterFault, match=r"Ray broke down .*finished work is kept, rerun the command") as caught:
        training._raise_fault(WorkerGroupError("an essay\nof many lines", {0: lost}), RUN)
    assert "\n" not in str(caught.value)


def test_a_controller_that_broke_down_is_a_fault():
    with pytest.raises(ClusterFault, match="placement group removed"):
        training._raise_fault(ControllerError(RuntimeError("the placement group removed")), RUN)


def test_a_controller_that_cannot_write_names_the_runs_folder():
    refused = ControllerError(PermissionError("An error occurred (AccessDenied)\nwhen calling PutObject"))
    with pytest.raises(StoreFault, match=rf"^{RUN}: An error occurred .*; fix this and rerun to resume$"):
        training._raise_fault(refused, RUN)


def test_an_error_of_our_own_code_keeps_its_traceback():
    ours = RayTaskError("loop", "Traceback ...", KeyError("late"))
    training._raise_fault(WorkerGroupError("an essay", {0: ours}), RUN)
    training._raise_fault(WorkerGroupError("an essay", {0: KeyError("late")}), RUN)


@pytest.mark.parametrize("error", [UserError("u"), DataError("d"), Fault("f"), StoreError("s"), StoreFault("t")])
def test_expected_errors_cross_processes_as_what_they_are(error):
    def fail():
        raise error

    arrived = pickle.loads(pickle.dumps(Outcome.of(fail)))
    with pytest.raises(type(error)) as caught:
        arrived.get()
    assert str(caught.value) == str(error)


def test_memory_that_does_not_suffice_in_a_worker_is_a_fault():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError()):
        with pytest.raises(Fault, match=r"ran out of memory \(.+\); raise --accumulate"), training.reachable_data():
            raise error


def test_checkpoints_of_nobody_knows_which_run_are_not_resumed(tmp_path):
    training._check_checkpoints(str(tmp_path), begun=False)
    listed = tmp_path / "checkpoint_manager_snapshot.json"
    listed.write_text(json.dumps({"checkpoint_results": []}))
    training._check_checkpoints(str(tmp_path), begun=True)
    with pytest.raises(StoreError, match=r"expected run\.json beside the checkpoints of a run, found none"):
        training._check_checkpoints(str(tmp_path), begun=False)
    listed.write_text('{"checkpoint_res')
    with pytest.raises(StoreError, match="Ray's list of checkpoints, got a damaged file"):
        training._check_checkpoints(str(tmp_path), begun=True)


@pytest.mark.parametrize("left", [0, 100, -30])
def test_a_state_that_was_cut_is_named(tmp_path, monkeypatch, left):
    torch.save({"step": 3, "weight": torch.ones(100)}, tmp_path / "state.pt")
    whole = (tmp_path / "state.pt").read_bytes()
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: ray.train.Checkpoint(str(tmp_path)))
    worker = SimpleNamespace(run=None, lost=())
    assert training.load_state(worker)["step"] == 3
    (tmp_path / "state.pt").write_bytes(whole[:left])
    with pytest.raises(StoreError, match=r"state\.pt: expected a training's state, got a damaged file"):
        training.load_state(worker)


def test_a_score_that_was_cut_is_scored_again(tmp_path):
    scores = ScoreFile(str(tmp_path), "4d", {"fold": 0, "shots": 1})
    scores.write({"miou": 0.5})
    assert scores.finished("sqlite:///none.db") == {"miou": 0.5}
    (tmp_path / scores.file).write_bytes((tmp_path / scores.file).read_bytes()[:40])
    assert scores.finished("sqlite:///none.db") is None
