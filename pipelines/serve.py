"""Masks of your own classes as a service: photographs in over HTTP, masks out.

    python -m pipelines.serve --class cat.class --class dog.class
    curl --data-binary @photo.jpg http://127.0.0.1:8000/segment
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/picture?format=overlay' > overlay.png

`/docs` describes the answers, `/` lists the classes. Runs until it is stopped; with RAY_ADDRESS on that cluster, where
every node listens. From --replicas to --most-replicas it scales with the photographs that wait; a node at which more
than --queue wait answers 503.
"""

import logging
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fsdino.errors import Fault, UserError, first_line
from pipelines import checkpoints, cluster
from pipelines.checks import Count, Few, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import Examples, named_classes
from pipelines.recipes import Backbone

if TYPE_CHECKING:
    from ray import serve

NAME, WATCH_SECONDS, TIMEOUT_S = "fsdino", 2.0, 120.0


@dataclass(frozen=True)
class Settings:
    """Answer with masks of the classes in each photograph that is sent."""

    classes: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="class")]
    """A class: a file that `register` wrote, or its name, and PHOTOGRAPH=MASK of each support. Once for each class."""
    checkpoint: Place | None = None
    """Checkpoint folder of train_episodic (its `final`), visible from every node; none: the one that comes with the
    project."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all interfaces. There is no password."""
    port: Annotated[int, Range(1, 65535)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Copies of the networks."""
    most_replicas: Count | None = None
    """Copies at most, when many photographs wait; none: as many as --replicas."""
    replica_cpus: Annotated[float, Range(0.1, 1024)] = 1.0
    """Cores of each."""
    gpu: bool = False
    """Each replica on a GPU of its own."""
    batch: Few = 4
    """Photographs that go through the encoder at once, if so many wait."""
    queue: Count = 64
    """Photographs that may wait at each node, beside two batches in each replica."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check everything, start the service, and watch it until the command is stopped."""
    wanted = checked_classes(settings)
    record = checkpoints.read_record(checkpoints.chosen(settings.checkpoint), "segmenter")
    if not cluster.elsewhere():
        _check_free(settings)
    backbone = Backbone(**record["backbone"])
    weights = settings.encoder_weights or backbone.encoder_weights
    wants = {"CPU": settings.replicas * settings.replica_cpus, "GPU": settings.replicas * float(settings.gpu)}
    needs = cluster.Needs((), (), ((backbone.encoder, weights),))
    cluster.connect(wants, "serve", "lower --replicas or --replica-cpus", needs)
    from pipelines import serving

    application = serving.build_application(settings, wanted)
    names = [one.name for one in wanted]
    with cluster.faults(), _running(settings, application):
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"port {settings.port} of every node" if cluster.elsewhere() else f"http://{host}:{settings.port}"
        print(f"serving {', '.join(names)} on {where}; Ctrl-C stops", file=sys.stderr)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(WATCH_SECONDS)
                _check_runs()
    return {"served": names}


def checked_classes(settings: Settings) -> list[Examples]:
    """The classes that the flags name, their examples read. Raises UserError for settings that make no service."""
    wanted = named_classes(settings.classes, settings.mask_value)
    most = settings.most_replicas
    if most is not None and most < settings.replicas:
        raise UserError(f"--most-replicas {most}: expected at least --replicas {settings.replicas}")
    return wanted


def _check_free(settings: Settings) -> None:
    """Raise UserError if this machine cannot listen there."""
    at = f"--host {settings.host} --port {settings.port}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        raise UserError(f"{at}: expected an address to listen on, got: {first_line(error)}; choose another") from None


@contextmanager
def _running(settings: Settings, application: "serve.Application") -> Iterator[None]:
    """Within the block the service runs, beside whatever the cluster's Serve runs already.

    Raises UserError if that is a service of this name, or listens on another address; Fault if it does not start.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client  # it has no public name

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=TIMEOUT_S))
    else:
        there = client.http_config
        if (there.host, there.port) != (settings.host, settings.port):
            raise UserError(
                f"--host {settings.host} --port {settings.port}: this cluster's Serve listens on "
                f"{there.host}:{there.port} already; ask for that, or end it with `serve shutdown`"
            )
        if NAME in serve.status().applications:
            raise UserError(f"serve: this cluster has a service called {NAME} already; stop the command that runs it")
    try:
        try:
            serve.run(application, name=NAME)
        except RuntimeError as error:
            raise Fault(f"serve: {_reason() or first_line(error)}; correct this and rerun") from None
        yield
    finally:
        with suppress(RayError):
            if client is None and cluster.elsewhere():
                serve.shutdown()
            else:  # a Ray of its own ends with the command
                serve.delete(NAME)


def _check_runs() -> None:
    """Raise Fault if the service is gone, or cannot come back."""
    from ray import serve

    ours = serve.status().applications.get(NAME)
    if ours is None:
        raise Fault("serve: the service was deleted by another command; rerun to start it again")
    if ours.status in ("DEPLOY_FAILED", "DELETING"):
        raise Fault(f"serve: {_reason()}; rerun to start it again")


def _reason() -> str:
    """The last line of what the deployments say, which is the error of a replica that does not start."""
    from ray import serve

    ours = serve.status().applications.get(NAME)
    said = [] if ours is None else [one.message for one in ours.deployments.values()]
    return "\n".join(said).strip().rpartition("\n")[2]


if __name__ == "__main__":
    main(Settings, job)
