"""A tracking server that dies, refuses or comes back: no work is lost to it, and a rerun sends what is missing."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from feature_store.lock import locked
from feature_store.storage import open_folder
from fsdino.errors import Fault, UserError
from fsdino.segmenter import Segmenter
from pipelines import tracking
from pipelines.outbox import Outbox, Unsent
from pipelines.runs import About
from tests.conftest import FOLD, ROOT, TRAINED, flags, run
from tests.servers import FaultProxy, free_port, mlflow_server

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A proxy before a real server, which can fail or refuse."""
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), port), FaultProxy(f"http://127.0.0.1:{port}", 0) as proxy:
        yield proxy


@pytest.fixture
def proxy(server):
    server.answer_all = server.refused_path = None
    yield server
    server.answer_all = server.refused_path = None


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(tracking, "PAUSE_SECONDS", 0.0)


def about(pipeline, name):
    return About(pipeline, "shapes", name, {"lr": 1})


def logged(uri, run_id):
    client = tracking.MlflowClient(uri)
    found = client.get_run(run_id)
    artifacts = [a.path for folder in ("panels", "segmenter") for a in client.list_artifacts(run_id, folder)]
    return {m.step: m.value for m in client.get_metric_history(run_id, "loss")}, artifacts, found.info.status


def test_a_server_that_stops_in_the_middle_costs_seconds_and_gets_everything_later(proxy, tmp_path, capsys):
    outbox = Outbox(str(tmp_path))
    with tracking.running(proxy.address, about("train", "cut"), outbox=outbox) as one:
        one.log(1, loss=3.0)
        one.flush()
        proxy.answer_all = 503
        started = time.monotonic()
        one.log(2, loss=2.0)
        one.flush()
        one.log(3, loss=1.0)
        one.picture(PICTURE, "panels/training.png")
        one.keep()
        assert time.monotonic() - started < 30
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1 and "a rerun of the command sends what is missing" in said[0]
    assert outbox.waiting() and not tracking.deliver(proxy.address, outbox) and outbox.waiting()
    proxy.answer_all = None
    assert tracking.deliver(proxy.address, outbox) and not outbox.waiting()
    assert logged(proxy.address, one.run_id) == ({1: 3.0, 2: 2.0, 3: 1.0}, ["panels/training.png"], "FINISHED")


def test_a_server_that_refuses_artifacts_still_gets_the_numbers(proxy, tmp_path):
    proxy.refused_path = "mlflow-artifacts"
    outbox = Outbox(str(tmp_path))
    with tracking.running(proxy.address, about("train", "refused"), outbox=outbox) as one:
        one.log(1, loss=3.0)
        one.picture(PICTURE, "panels/training.png")
    proxy.refused_path = None
    assert logged(proxy.address, one.run_id) == ({1: 3.0}, [], "FINISHED") and outbox.waiting()
    assert tracking.deliver(proxy.address, outbox)
    assert logged(proxy.address, one.run_id) == ({1: 3.0}, ["panels/training.png"], "FINISHED")


def test_what_a_run_left_is_sent_before_the_next_run_of_the_same_work(proxy, tmp_path):
    outbox, ids = Outbox(str(tmp_path)), []
    for number in (1.0, 2.0):
        proxy.answer_all = None
        with tracking.running(proxy.address, about("extract", "again"), outbox=outbox) as one:
            proxy.answer_all = 503
            one.log(1, loss=number)
        ids.append(one.run_id)
    proxy.answer_all = None
    assert logged(proxy.address, ids[0]) == ({1: 1.0}, [], "FINISHED") and outbox.waiting() == [ids[1]]
    assert tracking.deliver(proxy.address, outbox) and logged(proxy.address, ids[1]) == ({1: 2.0}, [], "FINISHED")


def test_what_is_kept_before_a_kill_is_sent_by_the_rerun(proxy, tmp_path):
    outbox = Outbox(str(tmp_path))
    with tracking.running(proxy.address, about("evaluate", "killed"), outbox=outbox) as one:
        one.log(0, loss=0.5)
        one.keep("FINISHED")
        killed = outbox.read(one.run_id)
    outbox.write(killed)  # as if nothing had come after
    assert tracking.close(proxy.address, one.run_id, outbox) and not outbox.waiting()
    assert logged(proxy.address, one.run_id) == ({0: 0.5}, [], "FINISHED")


def test_names_that_mlflow_does_not_take_are_written_otherwise(proxy, tmp_path):
    with tracking.running(proxy.address, about("evaluate", "names"), outbox=Outbox(str(tmp_path))) as one:
        one.log(0, **{"iou_jack-o'-lantern, large": 0.5})
    assert tracking.MlflowClient(proxy.address).get_run(one.run_id).data.metrics == {"iou_jack-o_-lantern_ large": 0.5}


def test_an_error_in_the_block_is_what_is_raised_even_if_the_server_is_gone(proxy, tmp_path):
    outbox = Outbox(str(tmp_path))
    with (
        pytest.raises(ZeroDivisionError),
        tracking.running(proxy.address, about("train", "error"), outbox=outbox) as one,
    ):
        proxy.answer_all = 503
        raise ZeroDivisionError
    proxy.answer_all = None
    assert tracking.deliver(proxy.address, outbox)
    assert logged(proxy.address, one.run_id)[2] == "FAILED"


def test_a_server_that_is_not_there_is_a_fault_and_a_wrong_address_a_mistake():
    with pytest.raises(Fault, match=r"--tracking-uri http://127\.0\.0\.1:9: MLflow does not answer there"):
        with tracking.running("http://127.0.0.1:9", about("train", "none")):
            raise AssertionError("it began")
    with pytest.raises(UserError, match="--tracking-uri nosuch://x: cannot be opened"):
        with tracking.running("nosuch://x", about("train", "none")):
            raise AssertionError("it began")


def test_a_new_database_may_be_opened_by_several_processes_at_once(tmp_path):
    code = "from pipelines import tracking; tracking.client('sqlite:///%s').search_experiments()" % (tmp_path / "m.db")
    opened = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in opened:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-2000:]


def test_a_checkpoint_of_a_run_that_was_moved_is_sent_from_where_it_is(tmp_path):
    uri, first, moved = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "first", tmp_path / "moved"
    (first / "final").mkdir(parents=True)
    (first / "final" / "segmenter.json").write_text("{}")
    with tracking.running(uri, about("train", "a training")) as run:
        run.log(0, loss=1.0)
    unsent = Unsent(run.run_id, folders={"segmenter": f"{first}/final"}, status="FINISHED")
    Outbox(str(first)).write(unsent)
    first.rename(moved)
    (moved / "final").rename(tmp_path / "elsewhere")
    outbox = Outbox(str(moved))
    assert not tracking.deliver(uri, outbox) and outbox.waiting(), "a checkpoint that is not there was called sent"
    (tmp_path / "elsewhere").rename(moved / "final")
    assert tracking.deliver(uri, outbox) and not outbox.waiting()
    assert [a.path for a in tracking.client(uri).list_artifacts(run.run_id, "segmenter")] == [
        "segmenter/segmenter.json"
    ]


@pytest.mark.parametrize("address", ["sqlite:///{}/text.db", "postgresql://localhost:9/x", "mysql://localhost:9/x"])
def test_a_database_that_cannot_be_opened_is_one_line_at_once(tmp_path, address):
    (tmp_path / "text.db").write_text(
        "no database, but a text that is long enough for a header of one hundred bytes" * 3
    )
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^--tracking-uri .*: cannot be opened: .+$"):
        tracking.client(address.format(tmp_path))
    assert time.monotonic() - started < 10


def scored(uri, trained_by, miou, tmp_path):
    """The end of a run that scored a model."""
    of = About("evaluate", "shapes", "a test", {}, tags={tracking.TEST: "shapes 1-shot"}, trained_by=trained_by)
    with tracking.running(uri, of, outbox=Outbox(str(tmp_path / "scores"))) as run:
        run.log(0, miou=miou)


@pytest.fixture
def versioned(tmp_path):
    """A database with a training run and a version of its model; a function that reads the version's tags."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.running(uri, about("train", "a training")) as run:
        run.log(0, loss=1.0)
    client = tracking.client(uri)
    client.create_registered_model("model")
    client.create_model_version("model", str(tmp_path), run_id=run.run_id)
    return uri, run.run_id, lambda: client.get_model_version("model", "1").tags


def test_a_model_carries_the_newest_score_of_a_test(versioned, tmp_path):
    uri, trained_by, tags = versioned
    for miou in (0.4, 0.6, 0.5):
        scored(uri, trained_by, miou, tmp_path)
        assert tags() == {"miou shapes 1-shot": f"{miou:.4f}"}


def test_a_score_that_a_model_could_not_be_given_is_given_by_a_rerun(versioned, tmp_path, monkeypatch, capsys):
    uri, trained_by, tags = versioned
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "tag_models", lambda *_: (_ for _ in ()).throw(MlflowException("busy")))
        scored(uri, trained_by, 0.4, tmp_path)
    assert "a rerun of the command sends what is missing" in capsys.readouterr().err and tags() == {}
    outbox = Outbox(str(tmp_path / "scores"))
    assert len(outbox.waiting()) == 1 and tracking.deliver(uri, outbox) and not outbox.waiting()
    assert tags() == {"miou shapes 1-shot": "0.4000"}


def train(places, name, *more):
    return run("train_episodic", *flags(places), "--fold", FOLD, "--name", name, *more)


@pytest.mark.slow
def test_a_training_whose_server_dies_publishes_its_checkpoint_and_is_complete_after_a_rerun(
    whole_run, places, proxy, capsys
):
    there = {**places, "--tracking-uri": proxy.address}
    folder = Path(places["--out"]) / TRAINED / "orphan"

    def cut():
        while not (folder / "run.json").exists():
            time.sleep(0.02)
        proxy.answer_all = 503

    watcher = threading.Thread(target=cut)
    watcher.start()
    trained = train(there, "orphan")
    watcher.join()
    assert trained["loss"] == pytest.approx(whole_run["4d"]["loss"], rel=1e-5)
    assert Segmenter.load(trained["checkpoint"])[1]["training"]["loss"] == trained["loss"]
    assert "the work goes on" in capsys.readouterr().err and list(folder.glob("unsent-*.json"))
    assert train(there, "orphan") == trained and list(folder.glob("unsent-*.json"))  # still dead
    proxy.answer_all = None
    assert train(there, "orphan") == trained and not list(folder.glob("unsent-*.json"))
    client = tracking.MlflowClient(proxy.address)
    (known,) = client.search_runs([client.get_experiment_by_name("train/shapes").experiment_id], "run_name = 'orphan'")
    losses, artifacts, status = logged(proxy.address, known.info.run_id)
    assert list(losses) == list(range(1, 11)) and status == "FINISHED"
    assert artifacts == ["segmenter/segmenter.json", "segmenter/segmenter.safetensors"]
    series = [a.path for a in client.list_artifacts(known.info.run_id, "images") if a.path.endswith(".png")]
    assert len(series) == 10  # the pictures of a training that met a dead server


@pytest.mark.slow
def test_a_training_that_diverges_stops_at_once_and_publishes_nothing(whole_run, places):
    with pytest.raises(Fault, match=r"training diverged at step \d+ \(.*\); the last checkpoint before it is kept"):
        train(places, "diverged", "--lr", 1000, "--decoder-lr", 1000, "--steps", 40)
    folder = Path(places["--out"]) / TRAINED / "diverged"
    assert (folder / "run.json").exists() and not (folder / "final").exists()


def test_a_second_training_of_one_name_is_told_who_works_there(whole_run, places, tmp_path):
    folder = Path(places["--out"]) / TRAINED / "twice"
    with locked(open_folder(str(folder))):
        with pytest.raises(Exception, match=r"the job of process \d+ on .* is working there; wait for it to end"):
            train(places, "twice")
    assert not (folder / "run.json").exists()


def test_data_that_a_run_beside_this_one_adds_first_are_named_again():
    """Two folds that begin at once log the same data; MLflow's database lets one of them win."""

    class Server:
        def __init__(self, errors):
            self.errors = errors

        def log_inputs(self, run_id, inputs):
            if self.errors:
                raise MlflowException(self.errors.pop())

    beside = "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest"
    server = Server([beside, beside])
    tracking._log_inputs(server, "run", [])
    assert not server.errors
    with pytest.raises(MlflowException, match="no such table"):
        tracking._log_inputs(Server(["no such table"]), "run", [])
