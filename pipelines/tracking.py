"""The only MLflow import: runs, batched metrics, pictures, checkpoints."""

import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from fsdino.errors import UserError

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
PARAM_LIMIT = 100  # MLflow's parameters in one request


class Run:
    """One MLflow run. Any process may open it by its id; metrics leave in batches."""

    def __init__(self, tracking_uri: str, run_id: str):
        self.tracking_uri = absolute_uri(tracking_uri)
        self.run_id = run_id
        self.client = MlflowClient(self.tracking_uri)
        self._pending: list[Metric] = []

    def log(self, step: int, **metrics: float) -> None:
        """Keep metrics of a step until `flush`."""
        now = int(time.time() * 1000)
        self._pending += [Metric(name, float(value), now, step) for name, value in metrics.items()]

    def flush(self) -> None:
        """Send what is kept; one request instead of one for each value (14-29 ms)."""
        for start in range(0, len(self._pending), 1000):
            self.client.log_batch(self.run_id, metrics=self._pending[start : start + 1000])
        self._pending = []

    def picture(self, image: Image.Image, name: str) -> None:
        """Store a picture as an artifact."""
        self.client.log_image(self.run_id, image, artifact_file=name)

    def folder(self, path: str | Path, name: str) -> None:
        """Store a folder's files as artifacts under `name`."""
        self.client.log_artifacts(self.run_id, str(path), name)

    def end(self, ok: bool = True) -> None:
        """Send the rest and mark the run finished or failed."""
        self.flush()
        self.client.set_terminated(self.run_id, "FINISHED" if ok else "FAILED")


@contextmanager
def running(
    tracking_uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """A new run, or the run `run_id` that was interrupted; at the end of the block it is finished, or failed.

    Raises UserError if the tracking server cannot be reached.
    """
    run = _begin(tracking_uri, experiment, name, params, tags or {}, run_id)
    try:
        yield run
    except BaseException:
        with suppress(Exception):  # what went wrong first is what counts
            run.end(ok=False)
        raise
    run.end()


def close(tracking_uri: str, run_id: str) -> None:
    """Mark a run finished that a kill left open; a run that this server does not know is left alone."""
    client = MlflowClient(absolute_uri(tracking_uri))
    if _knows(client, run_id) and client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")


def runs(tracking_uri: str, experiment: str) -> list[dict[str, dict]]:
    """Finished runs of an experiment, newest first: `params`, `metrics` (last values) and `tags` of each."""
    client = MlflowClient(absolute_uri(tracking_uri))
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return []
    listed: list[Any] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([known.experiment_id], "status = 'FINISHED'", max_results=1000, page_token=token)
        listed, token = [*listed, *page], page.token or None
    return [{"params": r.data.params, "metrics": r.data.metrics, "tags": r.data.tags} for r in listed]


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


def _begin(
    tracking_uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None,
) -> Run:
    uri = absolute_uri(tracking_uri)
    try:
        client = MlflowClient(uri)
        if run_id is not None and _knows(client, run_id):
            client.update_run(run_id, status="RUNNING")
            return Run(uri, run_id)
        experiment_id = _experiment(client, experiment, uri)
        run = client.create_run(experiment_id, run_name=name)
    except MlflowException as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"--tracking-uri {tracking_uri}: MLflow does not answer there ({first}); start it or name a file"
        ) from None
    run_id = run.info.run_id
    entries = [Param(key, str(value)[:6000]) for key, value in params.items()]
    for at in range(0, len(entries), PARAM_LIMIT):
        client.log_batch(run_id, params=entries[at : at + PARAM_LIMIT])
    client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in {"commit": commit(), **tags}.items()])
    return Run(uri, run_id)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, _artifact_root(uri))
        except MlflowException:  # another command was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _knows(client: MlflowClient, run_id: str) -> bool:
    """Whether the run is on this server: with another database, or a new one, it is logged as a new run."""
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
