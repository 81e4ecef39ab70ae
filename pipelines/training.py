"""Ray Train: a training loop on any number of workers, its checkpoints and resuming, the schedule, the run's record."""

import json
import math
import pickle
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch import Tensor, nn

from feature_store import StoreError, StoreFault
from feature_store.lock import locked
from feature_store.storage import open_folder
from feature_store.urls import absolute, filesystem, local_path
from fsdino import paper
from fsdino.errors import Fault, first_line
from pipelines import cluster, heap, preflight, stopping, tracking
from pipelines.meters import TrainingMeter
from pipelines.outbox import Outbox
from pipelines.outcome import EXPECTED, ClusterFault, Outcome
from pipelines.progress import Progress, shown
from pipelines.recipes import Device, Places, Workers
from pipelines.restarts import TellLost
from pipelines.runs import RUN, RunFolder

STATE = "state.pt"
GATHER_EVERY = 10  # steps whose losses stay on the device, and between looks at requests to stop


@dataclass(frozen=True)
class Worker:
    """What a training loop knows of its worker and its run."""

    device: torch.device
    rank: int
    world: int
    folder: str
    """URL of the run's folder."""
    precision: str
    settings: Workers
    progress: Any
    run: tracking.Run | None
    """MLflow's run; rank 0 alone logs."""
    meter: TrainingMeter = field(default_factory=lambda: TrainingMeter("", 0))
    lost: tuple[str, ...] = ()
    """What was lost before this worker was started, as rank 0 knows it."""

    def report(self, title: str, done: int, total: int) -> None:
        """Say where the loop is, for the progress bar; from rank 0."""
        if self.run:
            self.progress.tell.remote(title, done, total)

    def wishes(self, checkpointed: float) -> tuple[bool, bool]:
        """Whether the loop is asked to stop, and whether a checkpoint is due by the minutes since `checkpointed`
        (time.monotonic); rank 0 says, and every worker must call it."""

        def asked() -> tuple[float, ...]:
            minutes, since = self.settings.checkpoint_minutes, time.monotonic() - checkpointed
            return ray.get(self.progress.stopping.remote()), minutes is not None and since >= 60 * minutes

        stop, due = from_rank_0(asked)
        return bool(stop), bool(due)

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast if the settings ask for it."""
        return cluster.autocast(self.precision, self.device)


def train(
    run_folder: RunFolder,
    loop: Callable[[Any, Worker], None],
    job: Any,
    places: Places,
    workers: Workers,
    device: Device,
) -> None:
    """Run `loop(job, worker)` on Ray Train in the run's folder, or resume the run that was interrupted there.

    The loop publishes the run's `final` checkpoint as soon as it is trained. Raises the loop's own UserError,
    StoreError or Fault, ClusterFault, StoreError if another job trains there, and Stopped if a signal asked for it; a
    worker that dies, or whose place fails, is replaced as often as the settings say.
    """
    each = _of_worker(workers, device)
    what = f"{workers.workers} workers of {' and '.join(f'{amount:g} {kind}' for kind, amount in each.items())}"
    cluster.connect(resources(workers, device), what, fewer(device), needed(run_folder, places))
    with locked(open_folder(run_folder.url)) as lock:
        begun = run_folder.begun()
        _check_checkpoints(run_folder.url, begun is not None)
        run_id = begun["run_id"] if begun else None
        with (
            tracking.running(places.tracking_uri, run_folder.about, run_id, run_folder.outbox) as run,
            stopping.graceful(),
        ):
            run_folder.write(run.run_id)
            # On the driver's node, as Ray Train's controller: a lost node must not take it along.
            progress = Progress.options(scheduling_strategy=cluster.on()).remote()  # type: ignore[attr-defined]
            task = Task(
                loop=loop,
                job=job,
                folder=run_folder.url,
                outbox=run_folder.outbox,
                tracking_uri=run.tracking_uri,
                run_id=run.run_id,
                workers=workers,
                precision=device.train_precision,
                progress=progress,
            )
            scaling = ScalingConfig(num_workers=workers.workers, use_gpu=device.gpu, resources_per_worker=each)
            try:
                _fit(run_folder, task, scaling)
            except ClusterFault:
                stopping.check()  # a signal to the whole group of processes ends Ray as well
                raise
            if not run_folder.published:
                stopping.check()
        lock.check()
        run_folder.write(run.run_id, closed=not run.unsent)
    stopping.check()


def _check_checkpoints(url: str, begun: bool) -> None:
    """Raise StoreError for checkpoints that cannot be resumed: Ray's list of them is damaged, or nothing says of which
    run they are."""
    cure = "remove the folder, or choose another --out (or --name)"
    try:
        listed = open_folder(url).read(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    except FileNotFoundError:
        return
    if not begun:
        raise StoreError(f"{url}: expected {RUN} beside the checkpoints of a run, found none; {cure}")
    try:
        json.loads(bytes(listed))
    except ValueError:
        name = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
        raise StoreError(f"{url}/{name}: expected Ray's list of checkpoints, got a damaged file; {cure}") from None


def needed(run_folder: RunFolder, places: Places) -> cluster.Needs:
    """What a training needs on every node."""
    written = (run_folder.url, *preflight.databases(places.tracking_uri))
    stores = tuple(dict.fromkeys(given.place for given in run_folder.inputs))
    return cluster.Needs(written, (places.data, *stores), tracking_uri=places.tracking_uri)


def resources(workers: Workers, device: Device) -> dict[str, float]:
    """What a training asks of the cluster."""
    return {kind: amount * workers.workers for kind, amount in _of_worker(workers, device).items()}


def fewer(device: Device) -> str:
    """What to do where a cluster has less."""
    return "lower --workers or --worker-cpus" + (", or use --no-gpu" if device.gpu else "")


def _of_worker(workers: Workers, device: Device) -> dict[str, float]:
    return {"CPU": workers.worker_cpus} | ({"GPU": 1.0} if device.gpu else {})


def _fit(run_folder: RunFolder, task: "Task", scaling: ScalingConfig) -> None:
    """Ray Train's part. Raises as `train`."""
    storage_path, storage_filesystem = _storage(absolute(run_folder.folder))
    trainer = TorchTrainer(
        _work,
        # As bytes: the controller would unpickle it, and load all that the loop needs.
        train_loop_config={"task": cloudpickle.dumps(task), "progress": task.progress},
        scaling_config=scaling,
        run_config=RunConfig(
            name=run_folder.name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=FailureConfig(max_failures=task.workers.worker_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=task.workers.checkpoints_kept),
            callbacks=[TellLost(task.progress, task.workers.worker_failures)],  # type: ignore[list-item]
        ),
    )
    progress = task.progress
    with shown(progress), cluster.watched(lambda line: progress.lose.remote(line)):
        try:
            with cluster.faults():
                _in_a_thread(trainer.fit)
        except ClusterFault:
            raise
        except Exception as error:
            ray.get(progress.outcome.remote()).get()
            _raise_fault(error, run_folder.url)
            raise
        _lasting(ray.get(progress.outcome.remote())).get()


def _in_a_thread(work: Callable[[], object]) -> None:
    """Do work beside this thread, which stays free for signals: Ray Train would take them over in the main one."""
    failed: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        stopping.check_insisted()
    for error in failed:
        raise error


def _raise_fault(error: Exception, url: str) -> None:
    """Raise ClusterFault if Ray lost its workers (killed, out of memory, a dead node) or its controller, StoreFault if
    the controller could not write to the run's folder; errors of our own code in a worker are neither."""
    if isinstance(error, WorkerGroupError):
        causes = [getattr(failure, "base_exception", failure) for failure in error.worker_failures.values()]
        lost = [cause for cause in causes if isinstance(cause, RayError) and not isinstance(cause, RayTaskError)]
        if lost:
            raise ClusterFault(lost[0]) from error
    if isinstance(error, ControllerError):
        if isinstance(error.controller_failure, OSError):
            raise _unwritten(url, error.controller_failure) from error
        raise ClusterFault(error.controller_failure) from error


def _unwritten(url: str, error: OSError) -> StoreFault:
    """A run's folder that fails."""
    return StoreFault(f"{url}: {first_line(error)}; fix this and rerun to resume")


@dataclass(frozen=True)
class Task:
    """What every worker gets."""

    loop: Callable[[Any, Worker], None]
    job: Any
    folder: str
    outbox: Outbox
    tracking_uri: str
    run_id: str
    workers: Workers
    precision: str
    progress: Any


def _lasting(outcome: Outcome[None]) -> Outcome[None]:
    """The outcome, unless its error is a place's that failed: a worker that was started anew may have passed it."""
    return Outcome() if isinstance(outcome.error, StoreFault) else outcome


def _storage(folder: str) -> tuple[str, Any]:
    """Where Ray keeps a run's checkpoints: a path of this machine, or a path and pyarrow's form of a file system."""
    path = local_path(folder)
    if path is not None:
        return path, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, root = filesystem(folder)
    return root, PyFileSystem(FSSpecHandler(fs))


def _work(config: dict[str, Any]) -> None:
    """In a worker: the loop, whose expected error is told to the driver.

    A place that failed is tried again with new workers; any other expected error would only repeat.
    """
    progress, context = config["progress"], ray.train.get_context()
    if _lasting(ray.get(progress.outcome.remote())).error is not None:
        return
    if context.get_world_rank() == 0:  # what an earlier attempt met is over
        ray.get(progress.end.remote(Outcome[None]()))
    try:
        with reachable_data():
            _loop(cloudpickle.loads(config["task"]), context)
    except EXPECTED as error:
        outcome = Outcome[None](error=error)
        ray.get(progress.end.remote(outcome))
        # Others wait for this one, or a new one may pass.
        if context.get_world_size() > 1 or _lasting(outcome).error is None:
            raise


def _loop(task: Task, context: Any) -> None:
    """In a worker: seed, threads and device, then the task's loop."""
    heap.keep_freed_memory()
    torch.manual_seed(task.workers.seed)
    # Ray sets OMP_NUM_THREADS from whole CPUs before torch is loaded; this also covers fractions.
    torch.set_num_threads(max(1, int(task.workers.worker_cpus)))
    rank = context.get_world_rank()
    worker = Worker(
        device=ray.train.torch.get_device(),
        rank=rank,
        world=context.get_world_size(),
        folder=task.folder,
        precision=task.precision,
        settings=task.workers,
        progress=task.progress,
        run=_run(task) if rank == 0 else None,
        meter=TrainingMeter(task.folder.rstrip("/").rsplit("/", 1)[-1], rank),
        lost=tuple(ray.get(task.progress.lost.remote())) if rank == 0 else (),
    )
    task.loop(task.job, worker)


@contextmanager
def reachable_data() -> Iterator[None]:
    """Failures of the operating system under the data as failures of a place, which another try may pass; memory that
    does not suffice as a fault, which would only repeat."""
    try:
        yield
    except OSError as error:
        raise StoreFault(f"{error.filename or 'the data'}: {first_line(error)}; fix this and rerun to resume") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        told = first_line(error) or "of this machine"
        raise Fault(f"a worker ran out of memory ({told}); raise --accumulate and rerun to resume") from None


def _run(task: Task) -> tracking.Run:
    """MLflow's run, which tells the driver what the user should know."""
    run = tracking.Run(task.tracking_uri, task.run_id, task.outbox, lambda text: task.progress.note.remote(text))
    run.resume()
    return run


def mean_over_ranks(values: Tensor) -> Tensor:
    """Numbers of every rank's share of a batch, averaged, in place; every rank must call it."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


def check_numbers(step: int, numbers: dict[str, float]) -> None:
    """Raise Fault if a loss is not a number: nothing later can be trusted."""
    _check_finite(step, [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)])


def check_weights(step: int, model: nn.Module) -> None:
    """Raise Fault if a weight that is about to be kept is not a number."""
    _check_finite(step, [f"{name} is not finite" for name, p in model.named_parameters() if not p.isfinite().all()])


def _check_finite(step: int, wrong: list[str]) -> None:
    if wrong:
        raise Fault(
            f"training diverged at step {step} ({wrong[0]}); the last checkpoint before it is kept, nothing is "
            "published; take a lower learning rate, or fp32, under another --name or --out"
        )


class Losses:
    """Losses of the steps since they were last gathered; they stay on the device, which is not waited for."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Keep a step's."""
        self._steps.append((step, losses))

    def gather(self) -> list[tuple[int, dict[str, float]]]:
        """Each step's, averaged over ranks; every rank must call it. Raises Fault for one that is not a number."""
        if not self._steps:
            return []
        flat = {f"{step} {name}": loss for step, losses in self._steps for name, loss in losses.items()}
        stacked = torch.stack([loss.detach().float() for loss in flat.values()])
        means = dict(zip(flat, mean_over_ranks(stacked).tolist(), strict=True))
        found = [(step, {name: means[f"{step} {name}"] for name in losses}) for step, losses in self._steps]
        self._steps = []
        for step, of_step in found:
            check_numbers(step, of_step)
        return found


class Waiting:
    """How much of the time a loop waits, as a context around each wait."""

    def __init__(self) -> None:
        self._waited, self._since = 0.0, time.perf_counter()

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._began

    def share(self) -> float:
        """Share of the time since it was last asked."""
        now = time.perf_counter()
        share = self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return share


def from_rank_0(compute: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Numbers that rank 0 computes and every rank gets; every rank must call it."""
    if not torch.distributed.is_initialized():
        return compute()
    shared: list[Any] = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shared, src=0, device=ray.train.torch.get_device())
    return shared[0]


class Stopwatch:
    """Seconds of work, over all the times a run was resumed."""

    def __init__(self, before: float):
        self._before, self._started = before, time.perf_counter()

    def total(self) -> float:
        """Seconds until now."""
        return self._before + time.perf_counter() - self._started


def poly(step: int, steps: int) -> float:
    """Factor of the learning rate before a step: (1 - step / steps)^0.9."""
    return (1 - step / steps) ** paper.POLY_POWER


def worker_batches(first: int, steps: int, batch: int, rank: int, world: int) -> Iterator[range]:
    """Indices of a worker's samples for each step: step s is indices s*batch ... (s+1)*batch, split evenly."""
    share = batch // world
    for step in range(first, steps):
        yield range(step * batch + rank * share, step * batch + (rank + 1) * share)


def save_state(worker: Worker, metrics: dict[str, float], **state: Any) -> None:
    """Report a checkpoint of tensors and numbers from rank 0; every rank must call it. Raises StoreFault if the run's
    folder fails."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if worker.rank == 0:
            try:
                torch.save(state, Path(folder) / STATE)
            except RuntimeError as error:  # torch's own of a full disk
                raise StoreFault(f"{folder}: {first_line(error)}; free some space there, or set TMPDIR") from None
            checkpoint = Checkpoint.from_directory(folder)
        try:
            ray.train.report(metrics, checkpoint=checkpoint)
        except OSError as error:
            raise _unwritten(worker.folder, error) from None


def load_state(worker: Worker) -> dict[str, Any] | None:
    """The last checkpoint's state, None in a fresh run. After a loss it says from where the training goes on."""
    checkpoint, state = ray.train.get_checkpoint(), None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            try:
                state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise StoreError(
                    f"{checkpoint.path}/{STATE}: expected a training's state, got a damaged file "
                    f"({first_line(error)}); remove the run's folder, or choose another --out (or --name)"
                ) from None
    if worker.run and worker.lost:
        step = state["step"] if state else 0
        stage = f" of stage {state['stage'] + 1}" if state and "stage" in state else ""
        where = f"resumes after step {step}{stage}, its last checkpoint" if state else "starts anew"
        worker.progress.note.remote(f"{worker.world} workers are back; the training {where}")
        worker.run.log(step, losses_of_workers=len(worker.lost))
        worker.run.file("\n".join(worker.lost).encode(), "lost.txt")
    return state
