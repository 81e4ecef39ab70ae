"""MLflow's runs: experiments, batched metrics, pictures, what a run read, checkpoints (models: registry.py)."""

import fcntl
import getpass
import io
import json
import logging
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# A dead server costs seconds, not the minutes of MLflow's own retries: what it missed is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.utils import mlflow_tags
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from feature_store.errors import StoreError
from feature_store.storage import open_folder
from feature_store.urls import redacted, redacted_text
from fsdino.errors import Fault, UserError, first_line
from pipelines.outbox import Outbox, Unsent
from pipelines.runs import About, Input

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
PARAM_LIMIT, METRIC_LIMIT = 100, 1000  # MLflow's in one request
PAUSE_SECONDS = 30.0
DESCRIPTIONS = {
    "extract": "Features of the images of {}, computed once into stores.",
    "distill": "Adapters that have learnt the teacher's embeddings of {}.",
    "train": "Few-shot segmenters, trained on the base classes of {}: a run for each fold and model.",
    "evaluate": "Scores on classes of {} that training never saw: a run for each seed, their mean above them.",
    "annotate": "Classes of a user's own, found in the photographs of {}.",
    "analyze": "How well the layers of an encoder agree with a teacher on {}.",
}
"""Of the experiments, which are called PIPELINE/DATASET."""
SUMMARY, TEST, TRAINED_BY = "summary", "test", "trained_by"
"""Tags: of a run that sums up others; what a test was; the run that trained what it scored."""
TAGGED = ("miou", "fb_iou", "empty", "j_and_f")
"""Measures that a registered model carries."""
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens it as one of language models
PROFILE_LIMIT = 60000
NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")
"""What MLflow takes in no name of a metric or tag."""


def note(text: str) -> None:
    """A line for the user that is no error."""
    print(f"note: {redacted_text(text)}", file=sys.stderr, flush=True)


class Run:
    """One MLflow run. Any process may open it by its id; metrics leave in batches.

    A server that fails or refuses stops nobody's work: what could not be sent is said once, kept in `outbox` at
    checkpoints and at the end, and sent by whoever opens the run next.
    """

    def __init__(self, tracking_uri: str, run_id: str, outbox: Outbox | None = None, say: Callable[[str], None] = note):
        self.tracking_uri, self.run_id, self.outbox, self.say = tracking_uri, run_id, outbox, say
        self.client = client(tracking_uri)
        self.unsent = Unsent(run_id)
        self.trained_by = ""
        """The run whose registered models get this one's scores, once it has ended."""
        self._said, self._next_try = False, 0.0
        self._monitors: list[Any] = []

    def resume(self) -> None:
        """Take over what an earlier worker of this run could not send."""
        if self.outbox:
            self.unsent = self.outbox.read(self.run_id)
            self.unsent.status = ""  # it goes on

    def log(self, step: int, **metrics: float) -> None:
        """Keep metrics of a step until `flush`."""
        now = int(time.time() * 1000)
        self.unsent.points += [
            (NOT_IN_NAMES.sub("_", name), float(value), now, step) for name, value in metrics.items()
        ]

    def measure_machine(self, step: int) -> None:
        """Keep this machine's load, memory and GPUs as MLflow's system metrics."""
        if not self._monitors:
            self._monitors = [CPUMonitor()]
            with suppress(ImportError, RuntimeError):  # without a GPU, or without NVIDIA's library
                self._monitors.append(GPUMonitor())
        for monitor in self._monitors:
            monitor.collect_metrics()
            self.log(step, **{f"system/{name}": value for name, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()

    def picture(self, image: Image.Image, name: str) -> None:
        """Store a picture as an artifact, with the next flush."""
        self.unsent.files[name] = _png(image)

    def picture_of_step(self, image: Image.Image, name: str, step: int) -> None:
        """Store a picture of a series, which the UI shows by its steps, with the next flush."""
        self.unsent.series.append((name, step, _png(image)))

    def file(self, data: bytes, name: str) -> None:
        """Store a file as an artifact, with the next flush."""
        self.unsent.files[name] = data

    def folder(self, url: str, name: str) -> None:
        """Store a published folder's files as artifacts under `name`, with the next flush."""
        self.unsent.folders[name] = url

    def flush(self, at_once: bool = False) -> None:
        """Send what is kept: metrics in one request instead of one for each value (14-29 ms). After a failure it waits
        half a minute before it tries again, unless `at_once`."""
        if not self.unsent or (time.monotonic() < self._next_try and not at_once):
            return
        try:
            self._send()
        except Exception as error:  # of MLflow, requests, SQLAlchemy, or an artifact store's driver
            self._next_try = time.monotonic() + PAUSE_SECONDS
            if not self._said:
                self._said = True
                self.say(
                    f"MLflow at {redacted(self.tracking_uri)} did not accept the run's data ({first_line(error)}); the "
                    "work goes on, and a rerun of the command sends what is missing"
                )

    def keep(self, status: str | None = None) -> None:
        """Put all that has not been sent where a rerun finds it; with the `status` that the run will have before a
        result is published, so that neither can be lost without the other."""
        if status is not None:
            self._end(status)
        if self.outbox:
            self.outbox.write(self.unsent)

    def checkpoint(self) -> None:
        """Send what there is, and keep the rest."""
        self.flush()
        if self._said:
            self.keep()

    def end(self, status: str = "FINISHED") -> None:
        """Send the rest and say how the run ended."""
        kept = self.outbox.waiting() if self.outbox else []
        if self.outbox and self.run_id in kept and not self.unsent:  # a worker's
            self.unsent = self.outbox.read(self.run_id)
        self._end(status)
        self.flush(at_once=True)
        if self.outbox and (self.unsent or self.run_id in kept):
            self.outbox.write(self.unsent)

    def _end(self, status: str) -> None:
        self.unsent.status, self.unsent.trained_by = status, self.trained_by

    def _send(self) -> None:
        unsent = self.unsent
        while unsent.points:
            batch = unsent.points[:METRIC_LIMIT]
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            del unsent.points[: len(batch)]
        if unsent.status:
            self.client.set_terminated(self.run_id, unsent.status)
            unsent.status = ""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in list(unsent.files.items()):
                path = Path(folder) / Path(name).name
                path.write_bytes(data)
                folder_of = str(Path(name).parent)
                self.client.log_artifact(self.run_id, str(path), None if folder_of == "." else folder_of)
                del unsent.files[name]
        while unsent.series:
            name, step, data = unsent.series[0]
            self.client.log_image(self.run_id, Image.open(io.BytesIO(data)), key=name, step=step)
            del unsent.series[0]
        for name, url in list(unsent.folders.items()):
            with tempfile.TemporaryDirectory() as folder:
                published = open_folder(url)
                names = published.names("")
                if not names:
                    raise StoreError(f"{url}: expected a checkpoint, found none")
                for file in names:
                    (Path(folder) / file).write_bytes(published.read(file))
                self.client.log_artifacts(self.run_id, folder, name)
            del unsent.folders[name]
        if unsent.trained_by:
            tag_models(self.client, unsent.trained_by)
            unsent.trained_by = ""


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@contextmanager
def running(tracking_uri: str, about: About, run_id: str | None = None, outbox: Outbox | None = None) -> Iterator[Run]:
    """A new run, or the run `run_id` that was interrupted; at the end of the block it is finished, or failed.

    Raises Fault if the tracking server does not answer at the beginning, and UserError if it refuses.
    """
    run = _begin(tracking_uri, about, run_id, outbox)
    run.trained_by = about.trained_by or ""
    if outbox and run_id is None:
        deliver(tracking_uri, outbox)
    try:
        yield run
    except BaseException as error:
        with suppress(StoreError):  # what went wrong first is what counts
            done = run.unsent.status == "FINISHED"
            run.end("FINISHED" if done else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.end()


@contextmanager
def optional(run: Run, what: str) -> Iterator[None]:
    """A part of the record that the result does not depend on: what fails in it is said, and the work goes on."""
    try:
        yield
    except (UserError, StoreError, OSError) as error:
        run.say(f"{what} is left out: {first_line(error)}")


def deliver(tracking_uri: str, outbox: Outbox) -> bool:
    """Send what earlier runs left in their outbox; a run that this server does not know is left alone. Whether nothing
    waits any more that this server wants."""
    done = True
    for run_id in outbox.waiting():
        try:
            if not _knows(client(tracking_uri), run_id):
                continue
            run = Run(tracking_uri, run_id, outbox)
        except (MlflowException, UserError) as error:
            note(
                f"MLflow at {redacted(tracking_uri)} still lacks data of a run ({first_line(error)}); rerun to send it"
            )
            return False
        run.unsent = outbox.read(run_id)
        run.flush(at_once=True)
        outbox.write(run.unsent)
        done = done and not run.unsent
    return done


def close(tracking_uri: str, run_id: str, outbox: Outbox) -> bool:
    """Mark a run finished that a kill or a dead server left open, and send what is missing; a run that this server does
    not know is left alone. Whether all was sent."""
    if outbox.waiting() and not deliver(tracking_uri, outbox):
        return False
    try:
        known = client(tracking_uri)
        if _knows(known, run_id) and known.get_run(run_id).info.status != "FINISHED":
            known.set_terminated(run_id, "FINISHED")
    except (MlflowException, UserError) as error:
        note(f"MLflow at {redacted(tracking_uri)} cannot be told that the run ended ({first_line(error)})")
        return False
    return True


def client(tracking_uri: str) -> MlflowClient:
    """A client, one for each address of this process. Raises UserError if the address is none.

    Two processes that open a new SQLite file at once would both create its tables, so they take turns.
    """
    uri = absolute_uri(tracking_uri)
    with _clients_lock:
        if uri not in _clients:
            try:
                with _turn(uri):
                    if uri.startswith("sqlite:///"):  # MLflow would try ten times
                        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as file:
                            file.execute("PRAGMA schema_version")
                    made = MlflowClient(uri)
                    if uri.startswith("sqlite:"):
                        made.search_experiments(max_results=1)
            except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
                raise UserError(
                    f"--tracking-uri {redacted(tracking_uri)}: cannot be opened: {first_line(error)}"
                ) from None
            _clients[uri] = made
        return _clients[uri]


@contextmanager
def _turn(uri: str) -> Iterator[None]:
    """The only process that opens a SQLite file just now."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with open(uri.removeprefix("sqlite:///") + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_clients: dict[str, MlflowClient] = {}
_clients_lock = threading.Lock()


def tag_models(server: MlflowClient, trained_by: str) -> None:
    """Write the scores of a training run's tests on the models that were registered of it: the newest of each test,
    means where several seeds have them."""
    versions = server.search_model_versions(f"run_id = '{trained_by}'")
    experiments = server.search_experiments(filter_string="name LIKE 'evaluate/%'") if versions else []
    ids = [experiment.experiment_id for experiment in experiments]
    found = server.search_runs(ids, f"tags.{TRAINED_BY} = '{trained_by}' AND status = 'FINISHED'") if ids else []
    for run in reversed(found):  # from the oldest on
        if mlflow_tags.MLFLOW_PARENT_RUN_ID in run.data.tags or TEST not in run.data.tags:
            continue
        for measure in set(TAGGED) & run.data.metrics.keys():
            key = NOT_IN_NAMES.sub("_", f"{measure} {run.data.tags[TEST]}")
            value = f"{run.data.metrics[measure]:.4f}"
            for version in versions:
                server.set_model_version_tag(version.name, version.version, key, value)


def nest(parent: Run, run_ids: Iterable[str]) -> None:
    """Put runs that were begun by themselves below one that sums them up; those that its server knows."""
    for run_id in run_ids:
        with _answering(parent.tracking_uri):
            if _knows(parent.client, run_id):
                parent.client.set_tag(run_id, mlflow_tags.MLFLOW_PARENT_RUN_ID, parent.run_id)


def runs(tracking_uri: str, pipeline: str) -> list[dict[str, Any]]:
    """Finished runs of a pipeline on every data set, newest first: `run_id`, `params`, `metrics` (last values) and
    `tags` of each."""
    server = client(tracking_uri)
    with _answering(tracking_uri):
        known = list(server.search_experiments(filter_string=f"name LIKE '{pipeline}/%'"))
    listed: list[Any] = []
    token: str | None = "" if known else None
    while token is not None:
        with _answering(tracking_uri):
            ids = [experiment.experiment_id for experiment in known]
            page = server.search_runs(ids, "status = 'FINISHED'", max_results=1000, page_token=token)
        listed, token = [*listed, *page], page.token or None
    return [
        {"run_id": r.info.run_id, "params": r.data.params, "metrics": r.data.metrics, "tags": r.data.tags}
        for r in listed
    ]


def picture_of(tracking_uri: str, run_id: str, name: str) -> Image.Image:
    """A picture that a run logged. Raises Fault if it cannot be had."""
    with _answering(tracking_uri), tempfile.TemporaryDirectory() as folder:
        try:
            path = client(tracking_uri).download_artifacts(run_id, name, folder)
        except OSError as error:
            raise Fault(f"run {run_id}: {name} cannot be read: {first_line(error)}") from None
        with Image.open(path) as image:
            return image.convert("RGB")


def absolute_uri(tracking_uri: str) -> str:
    """A SQLite address with an absolute file, since a worker's working folder is not the driver's."""
    if not tracking_uri.startswith("sqlite:///"):
        return tracking_uri
    path = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def commit() -> str:
    """The checked-out commit, `-dirty` if files differ from it, or `unknown` outside a checkout."""
    if "FSDINO_COMMIT" in os.environ:  # an image without the repository
        return os.environ["FSDINO_COMMIT"]
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _artifact_root(uri: str) -> str | None:
    """Beside a SQLite file; a server has its own."""
    if urlsplit(uri).scheme != "sqlite":
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _begin(tracking_uri: str, about: About, run_id: str | None, outbox: Outbox | None) -> Run:
    uri, server = absolute_uri(tracking_uri), client(tracking_uri)
    with _answering(tracking_uri):
        if run_id is not None and _knows(server, run_id):
            server.update_run(run_id, status="RUNNING")
            return Run(uri, run_id, outbox)
        experiment_id = _experiment(server, about, uri)
        run_id = server.create_run(experiment_id, run_name=about.name, tags=_origin() | about.tags).info.run_id
        entries = [Param(key, str(value)[:6000]) for key, value in about.params.items()]
        for at in range(0, len(entries), PARAM_LIMIT):
            server.log_batch(run_id, params=entries[at : at + PARAM_LIMIT])
        if about.inputs:
            _log_inputs(server, run_id, [_dataset(one) for one in about.inputs])
        if about.parent is not None:
            server.set_tag(run_id, mlflow_tags.MLFLOW_PARENT_RUN_ID, about.parent)
        if about.trained_by is not None and _knows(server, about.trained_by):
            _link(server, run_id, about.trained_by)
    return Run(uri, run_id, outbox)


def _log_inputs(server: MlflowClient, run_id: str, inputs: list[DatasetInput]) -> None:
    """Retried if a concurrent run adds the same data set between MLflow's look-up and its insert."""
    for attempt in range(10):
        try:
            return server.log_inputs(run_id, inputs)
        except MlflowException as error:
            if "unique" not in str(error).lower() or attempt == 9:
                raise


def _origin() -> dict[str, str]:
    """Who runs what, of which commit."""
    with suppress(KeyError, OSError):  # a container's user may have no name
        return {mlflow_tags.MLFLOW_USER: getpass.getuser()} | _source()
    return _source()


def _source() -> dict[str, str]:
    module = f"pipelines.{Path(sys.argv[0]).stem}"
    return {
        mlflow_tags.MLFLOW_SOURCE_NAME: module,
        mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL",
        mlflow_tags.MLFLOW_GIT_COMMIT: commit(),
        "command": redacted_text(shlex.join(["python", "-m", module, *sys.argv[1:]]))[:5000],
    }


def _dataset(of: Input) -> DatasetInput:
    """MLflow's form of what a run read."""
    source, profile = json.dumps({"uri": redacted(of.place)}), json.dumps(of.profile)[:PROFILE_LIMIT]
    kind = "feature store" if "feature" in of.profile else "images"
    dataset = Dataset(of.name, of.digest, kind, source, profile=profile)
    return DatasetInput(dataset, [InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, of.context)])


def _link(server: MlflowClient, run_id: str, trained_by: str) -> None:
    """Lead from a run to the one that trained what it scores, and to the model that came of it."""
    other = server.get_run(trained_by)
    page = f"#/experiments/{other.info.experiment_id}/runs/{trained_by}"
    server.set_tag(run_id, mlflow_tags.MLFLOW_RUN_NOTE, f"Scores what [{other.info.run_name}]({page}) trained.")
    server.set_tag(run_id, TRAINED_BY, trained_by)
    models = [] if other.outputs is None else other.outputs.model_outputs
    if models:
        server.log_inputs(run_id, models=[LoggedModelInput(model.model_id) for model in models])


@contextmanager
def _answering(tracking_uri: str) -> Iterator[None]:
    """Failures of the server in one line."""
    place = f"--tracking-uri {redacted(tracking_uri)}"
    try:
        yield
    except MlflowException as error:
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(f"{place}: MLflow refuses ({first_line(error)}); check its user and password") from None
        raise Fault(f"{place}: MLflow does not answer there ({first_line(error)}); start it or name a file") from None


def _experiment(server: MlflowClient, about: About, uri: str) -> str:
    name = f"{about.pipeline}/{about.dataset}"
    found = server.get_experiment_by_name(name)
    if found is None:
        described = {mlflow_tags.MLFLOW_RUN_NOTE: DESCRIPTIONS[about.pipeline].format(about.dataset)}
        try:
            return server.create_experiment(name, _artifact_root(uri), tags=KIND | described)
        except MlflowException:  # another command was quicker
            found = server.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _knows(server: MlflowClient, run_id: str) -> bool:
    """Whether the run is on this server: with another database, or a new one, it is logged as a new run."""
    try:
        server.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
