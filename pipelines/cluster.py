"""The Ray cluster, joined or started and asked whether it has what a job wants; the device of a job without it."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from glob import glob
from typing import TYPE_CHECKING, Any

from fsdino.errors import Fault, UserError, first_line
from pipelines import preflight, ray_messages
from pipelines.outcome import ClusterFault
from pipelines.preflight import Needs
from pipelines.recipes import Device

if TYPE_CHECKING:
    import torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

WATCH_SECONDS = 2.0
LOOK_SECONDS = 120.0  # a loaded machine takes half a minute to start a worker


def elsewhere() -> bool:
    """Whether jobs run on a cluster that somebody started, rather than on a Ray of this process's own."""
    return "RAY_ADDRESS" in os.environ


def prepare(wanted: Mapping[str, float], job: str, cure: str, needs: Needs | None = None) -> None:
    """Before a job plans anything: join the cluster and look at its nodes; on this machine alone only count cores and
    GPUs, as Ray starts when there is work. Raises as `connect`."""
    if elsewhere():
        connect(wanted, job, cure, needs)
    else:
        _check_amounts(wanted, {"CPU": len(os.sched_getaffinity(0)), "GPU": len(glob("/dev/nvidia[0-9]*"))}, job, cure)


def connect(wanted: Mapping[str, float], job: str, cure: str, needs: Needs | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for this process.

    Raises UserError if it can never give a job all that it wants, for which Ray would wait for ever, nor bring the
    nodes that would; on this machine alone before Ray is started. Raises UserError as well if a node of a cluster lacks
    what the job needs there. Raises ClusterFault.
    """
    import ray

    if not ray.is_initialized():
        if not elsewhere():
            prepare(wanted, job, cure)
        ray_messages.divert()
        handler = signal.getsignal(signal.SIGTERM)
        _join()
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would end with its number for an exit code
        ray_messages.divert_loggers()
    with faults():
        _check_amounts(wanted, obtainable(), job, cure)
        if elsewhere() and needs is not None:
            look_at_nodes(needs)


def _check_amounts(wanted: Mapping[str, float], there: Mapping[str, float], job: str, cure: str) -> None:
    for kind, amount in wanted.items():
        if amount > there.get(kind, 0):
            raise UserError(f"{job}: expected a cluster with {amount:g} {kind}, got {there.get(kind, 0):g}; {cure}")


def obtainable() -> dict[str, float]:
    """What a cluster has, or its autoscaler may bring: the larger of both, of each resource."""
    import ray
    from ray._private.state import state  # Ray's own libraries ask there too; it has no public name

    there = dict(ray.cluster_resources())
    for kind, amount in (state.get_max_resources_from_cluster_config() or {}).items():
        there[kind] = max(there.get(kind, 0), amount)
    return there


def _join() -> None:
    """ray.init, its errors in one line."""
    import ray
    from ray.exceptions import AuthenticationError

    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS {address}: expected HOST:PORT of the head, or auto; to run a command through the dashboard, "
            "put it behind `ray job submit --address http://HOST:8265 --`"
        )
    if address not in ("", "auto", "local"):
        _check_listens(address)
    # Without `local` it would join whatever cluster was last started on this machine. A page for a Ray that lives as
    # long as this process takes a gigabyte.
    local: dict[str, Any] = {} if elsewhere() else {"address": "local", "include_dashboard": False}
    at = f"RAY_ADDRESS {address}"
    token = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the head's token"
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    except AuthenticationError as error:
        raise UserError(f"{at}: the cluster wants a token ({first_line(error)[:80]}); {token}") from None
    except Exception as error:  # it raises whatever it meets: RuntimeError, ConnectionError, Exception
        if elsewhere() and ray_messages.said("InvalidAuthToken"):
            raise UserError(f"{at}: the cluster refuses this token, or none; {token}") from None
        if "Version mismatch" in str(error):
            told = " ".join(str(error).split())
            raise UserError(f"{at}: {told}; run the command in the image or environment of the nodes") from None
        if elsewhere() and "Failed to connect to Ray cluster" in str(error):
            raise UserError(f"{at}: what listens there refuses us or is no Ray; {token}") from None
        raise ClusterFault(error) from error


def _check_listens(address: str) -> None:
    """Raise Fault if nothing is there: Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except ValueError:
        raise UserError(f"RAY_ADDRESS {address}: expected HOST:PORT of the head, or auto") from None
    except OSError as error:
        raise Fault(
            f"RAY_ADDRESS {address}: no Ray listens there ({error}); start the cluster (docs/cluster.md) or correct "
            "the address, and rerun"
        ) from None


def look_at_nodes(needs: Needs) -> None:
    """Raise UserError if a living node lacks what a job needs; further lines about it go to stderr. Once for each job
    and need."""
    import ray

    key = (ray.get_runtime_context().get_job_id(), needs)
    if key in _looked_at:
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look, asked_at = preflight.facts(), time.time()
    task = ray.remote(num_cpus=0, max_retries=1)(look)
    nothing = asdict(Needs()) | {"probes": {}, "sizes": {}}
    with preflight.probes(needs) as probes:
        question = preflight.question(needs, probes)
        asked = {task.options(scheduling_strategy=on(node["NodeID"])).remote(question): node for node in nodes}
        expected = look(nothing)
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        lines: list[str] = []
        for answer in answered:
            lines += preflight.problems(name_of(asked[answer]), expected, ray.get(answer), asked_at)
    for line in lines[1:]:
        print(f"also: {line}", file=sys.stderr)
    if lines:
        raise UserError(lines[0])
    if silent:
        raise Fault(
            f"node {name_of(asked[silent[0]])}: no task started there within {LOOK_SECONDS:.0f} s; look at it with "
            "`ray status` and at its memory, or take it away, and rerun"
        )
    _looked_at.add(key)


@contextmanager
def watched(lost: Callable[[str], None]) -> Iterator[None]:
    """Within the block `lost` gets a line for each node of the cluster that dies; it is called from another thread."""
    import ray

    if not elsewhere():
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        alive: dict[str, Mapping[str, Any]] = {}
        with suppress(Exception):  # Ray goes down: whoever waits for it hears that
            while not ended.wait(WATCH_SECONDS):
                nodes = ray.nodes()
                for node in nodes:
                    if not node["Alive"] and node["NodeID"] in alive:
                        lost(loss_of(alive.pop(node["NodeID"]), node.get("DeathReasonMessage") or "no reason given"))
                alive |= {node["NodeID"]: node for node in nodes if node["Alive"]}

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def loss_of(node: Mapping[str, Any], reason: str) -> str:
    """A line on a node that died."""
    had = [f"{node['Resources'][kind]:g} {kind}" for kind in ("CPU", "GPU") if node["Resources"].get(kind)]
    why = " ".join(reason.split())[:160].strip()
    return f"{time.strftime('%H:%M:%S')} node {name_of(node)} with {' and '.join(had) or 'no work'} lost ({why})"


def name_of(node: Mapping[str, Any]) -> str:
    """A node as messages call it: its host, and what tells two on one host apart."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


_looked_at: set[tuple[str, Needs]] = set()


def on(node: str | None = None) -> "NodeAffinitySchedulingStrategy":
    """Where an actor or task runs: on the driver's own node, or on that one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def faults() -> Iterator[None]:
    """Breakdowns of Ray itself as ClusterFault; errors of ours inside a worker stay what they are."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except (RayError, ConnectionError) as error:
        raise ClusterFault(error) from error


def device_of(device: Device) -> "torch.device":
    """The device of a job that runs in its own process. Raises UserError if a GPU is asked for and not there."""
    import torch

    if device.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: expected a CUDA device on this machine, found none; use --no-gpu")
    return torch.device("cuda" if device.gpu else "cpu")


def autocast(precision: str, device: "torch.device") -> AbstractContextManager:
    """Autocast to bf16 or fp16, or nothing for fp32."""
    import torch

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, half) if half else nullcontext()
