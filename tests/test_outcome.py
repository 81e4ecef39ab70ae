"""Ray's own breakdowns are one line; errors of our code stay what they are."""

import pickle

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from feature_store import StoreError, StoreFault
from fsdino.errors import DataError, Fault, UserError
from pipelines import training
from pipelines.outcome import ClusterFault, Outcome

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
