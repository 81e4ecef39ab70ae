"""Masks of your own classes as a service: photographs in by HTTP, masks out.

    python -m pipelines.serve --class cat.class --class dog.class
    curl --data-binary @photo.jpg http://127.0.0.1:8000/segment
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/picture?format=overlay' > overlay.png

`/docs` describes what it answers, `/` lists its classes. Runs until it is stopped; with RAY_ADDRESS on that cluster.
Replicas come and go with the queue, from --replicas to --most-replicas; more photographs than --queue get 503.
"""

import logging
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fsdino.errors import Fault, UserError, first_line
from pipelines import checkpoints, cluster
from pipelines.checks import Count, Few, Place, Range, Weights
from pipelines.cli import main
from pipelines.examples import read_classes
from pipelines.recipes import Backbone

if TYPE_CHECKING:
    from ray.serve.config import HTTPOptions

NAME, WATCH_SECONDS = "fsdino", 2.0


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
    """Address to listen on; 0.0.0.0: every network that the machine is in. There is no password."""
    port: Annotated[int, Range(1, 65535)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Copies of the networks that are always there."""
    most_replicas: Count | None = None
    """Copies that there may be while many photographs wait; none: as many as --replicas."""
    replica_cpus: Annotated[float, Range(0.1, 1024)] = 1.0
    """Cores of each."""
    gpu: bool = False
    """Each replica on a GPU of its own."""
    batch: Few = 4
    """Photographs that go through the encoder at once, if so many wait."""
    queue: Count = 64
    """Photographs that may wait for a replica."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


def job(settings: Settings) -> dict[str, Any]:
    """Check everything, start the service, and watch it until the command is stopped."""
    wanted = read_classes(settings.classes, settings.mask_value)
    if not wanted:
        raise UserError("--class: expected at least one class, got none")
    most = settings.most_replicas or settings.replicas
    if most < settings.replicas:
        raise UserError(f"--most-replicas {most}: expected at least --replicas {settings.replicas}")
    record = checkpoints.read_record(checkpoints.chosen(settings.checkpoint), "segmenter")
    _check_free(settings)
    backbone = Backbone(**record["backbone"])
    weights = settings.encoder_weights or backbone.encoder_weights
    wants = {"CPU": settings.replicas * settings.replica_cpus, "GPU": settings.replicas * float(settings.gpu)}
    needs = cluster.Needs((), (), ((backbone.encoder, weights),))
    cluster.connect(wants, "serve", "lower --replicas or --replica-cpus", needs)
    from ray import serve
    from ray.serve.config import HTTPOptions

    from pipelines import serving

    application = serving.built(settings)
    options = HTTPOptions(host=settings.host, port=settings.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with cluster.faults():
        serve.start(http_options=options)
        _check_listens_as_asked(options)
        try:
            serve.run(application, name=NAME)
            names = ", ".join(one.name for one in wanted)
            print(f"serving {names} on http://{settings.host}:{settings.port}; Ctrl-C stops", file=sys.stderr)
            while True:
                time.sleep(WATCH_SECONDS)
                _check_runs()
        finally:
            serve.delete(NAME)


def _check_free(settings: Settings) -> None:
    """Raise UserError if this machine, where it is the cluster, cannot listen there."""
    if cluster.elsewhere():
        return
    at = f"--host {settings.host} --port {settings.port}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        raise UserError(f"{at}: expected an address to listen on, got: {first_line(error)}; choose another") from None


def _check_listens_as_asked(options: "HTTPOptions") -> None:
    """Raise UserError if the cluster serves already, on another address: Serve would keep that one."""
    from ray.serve.context import _get_global_client  # it has no public name

    client = _get_global_client()
    assert client is not None
    there = client.http_config
    if (there.host, there.port) != (options.host, options.port):
        raise UserError(
            f"--host {options.host} --port {options.port}: this cluster's Serve listens on {there.host}:{there.port} "
            "already; ask for that, or end it with `serve shutdown`"
        )


def _check_runs() -> None:
    """Raise Fault if the service is gone, or cannot come back."""
    from ray import serve

    ours = serve.status().applications.get(NAME)
    if ours is None:
        raise Fault("serve: the service was deleted by another command; rerun to start it again")
    if ours.status in ("DEPLOY_FAILED", "DELETING"):
        raise Fault(f"serve: {' '.join(ours.message.split())[:200]}; rerun to start it again")


if __name__ == "__main__":
    main(Settings, job)
