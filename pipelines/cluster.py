"""The Ray cluster, joined or started and asked whether it has what a job wants; the device of a job without it."""

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.urls import local_path
from fsdino.errors import UserError
from pipelines.outcome import ClusterFault
from pipelines.recipes import Device

if TYPE_CHECKING:
    import torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def connect(wanted: Mapping[str, float], job: str, cure: str) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for this process.

    Raises UserError if it can never give a job all that it wants, for which Ray would wait for ever; on this machine
    alone before Ray is started. Raises ClusterFault.
    """
    import ray

    def check(available: Mapping[str, float]) -> None:
        for kind, amount in wanted.items():
            if amount > available.get(kind, 0):
                raise UserError(
                    f"{job}: expected a cluster with {amount:g} {kind}, got {available.get(kind, 0):g}; {cure}"
                )

    if not ray.is_initialized():
        if "RAY_ADDRESS" not in os.environ:
            check({"CPU": len(os.sched_getaffinity(0)), "GPU": len(glob("/dev/nvidia[0-9]*"))})
        handler = signal.getsignal(signal.SIGTERM)
        try:
            address = os.environ.get("RAY_ADDRESS", "local")  # with none, Ray would join any cluster that it finds here
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # it raises whatever it meets: RuntimeError, ConnectionError, Exception
            raise ClusterFault(error) from error
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would end with its number for an exit code
    with faults():
        check(ray.cluster_resources())


def on(node: str | None = None) -> "NodeAffinitySchedulingStrategy":
    """Where an actor or task runs: on the driver's own node, or on that one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)


def check_shared(places: Sequence[str]) -> None:
    """Raise UserError if a path is not the same folder on every node: what a worker writes would be lost to the others.

    The driver writes a file there, and a task on each other node looks for it.
    """
    import ray

    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    others.pop(ray.get_runtime_context().get_node_id(), None)
    look = ray.remote(num_cpus=0)(_sees)
    for path in filter(None, map(local_path, places)) if others else ():
        probe = Path(path) / f"probe-{uuid.uuid4().hex}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        try:
            asked = [look.options(scheduling_strategy=on(node)).remote(str(probe)) for node in others]
            with faults():
                seen = ray.get(asked)
        finally:
            probe.unlink()
        for host, sees in zip(others.values(), seen, strict=True):
            if not sees:
                raise UserError(
                    f"{path}: this path is not shared by all nodes ({host} does not see it); use s3:// or a shared "
                    "file system"
                )


def _sees(path: str) -> bool:
    """Whether a file that another node wrote is here; network file systems may take seconds to show it."""
    for _ in range(20):
        if os.path.exists(path):
            return True
        time.sleep(0.25)
    return False


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
    """Autocast to bf16, or nothing for fp32."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
