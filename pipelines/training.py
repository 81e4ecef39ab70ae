"""What both training jobs share: Ray Train with checkpoints, resuming, the schedule, and the run's record."""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from feature_store import FeatureStore, Fingerprint, files
from fsdino import paper
from fsdino.adapter import BottleneckAdapter
from fsdino.checkpoint import files as checkpoint_files
from fsdino.errors import UserError
from pipelines import tracking
from pipelines.recipes import Computing, Model, Places, Workers
from pipelines.stages import connect, open_at, store_url

MAX_WORKER_FAILURES = 3


def run(
    *,
    name: str,
    folder: str,
    experiment: str,
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    places: Places,
    workers: Workers,
    computing: Computing,
    identity: dict[str, Any],
    tags: dict[str, str],
    result: str,
) -> None:
    """Train `loop(config)` on Ray Train under `folder`/`name`, or go on with the run that was interrupted there.

    `identity` is what makes two runs the same run. Raises UserError if a run of another identity is in that folder.
    The loop finds its MLflow run in `config["run_id"]`, and writes `final/RESULT.json` last: then all is done.
    """
    folder = files.absolute(folder)
    identity = json.loads(json.dumps(identity))
    record = _record(f"{folder}/{name}")
    if record is not None and record["identity"] != identity:
        other = record["identity"]
        differing = [f"{k}: expected {v}, got {other.get(k)}" for k, v in identity.items() if other.get(k) != v]
        raise UserError(
            f"{folder}/{name}: a run with other settings is there ({'; '.join(differing)}); "
            "choose another --out or --name, or remove it"
        )
    run_id = record["run_id"] if record else None
    if run_id is not None and checkpoint_files(result)[1] in files.open_folder(f"{folder}/{name}").names("final"):
        tracking.close(places.tracking_uri, run_id)  # a kill may have come between the checkpoint and the end
        return
    with tracking.running(places.tracking_uri, experiment, name, identity, tags, run_id) as run:
        begun = json.dumps({"identity": identity, "run_id": run.run_id}).encode()
        files.open_folder(f"{folder}/{name}").write("run.json", [begun])
        connect()
        resources = {"CPU": workers.worker_cpus} | ({"GPU": 1.0} if computing.gpu else {})
        check_resources(resources, workers.workers)
        progress = Progress.remote()  # type: ignore[attr-defined]
        fs, root = fsspec.url_to_fs(folder)
        trainer = TorchTrainer(
            loop,
            train_loop_config=config
            | {"run_id": run.run_id, "tracking_uri": run.tracking_uri, "workers": workers, "progress": progress},
            scaling_config=ScalingConfig(
                num_workers=workers.workers, use_gpu=computing.gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=root,
                storage_filesystem=None if files.local_path(folder) else PyFileSystem(FSSpecHandler(fs)),
                failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        with _shown(progress):
            trainer.fit()


@ray.remote(num_cpus=0)
class Progress:
    """Where a training loop is; rank 0 tells it, the driver asks. Workers may be on any node."""

    def __init__(self):
        self._at: tuple[str, int, int | None] = ("starting workers", 0, None)

    def tell(self, title: str, done: int, total: int) -> None:
        """Set the stage's title, and its steps done and in all."""
        self._at = (title, done, total)

    def ask(self) -> tuple[str, int, int | None]:
        """What was told last."""
        return self._at


@contextmanager
def _shown(progress: Any) -> Iterator[None]:
    """A progress bar on this terminal while the block runs."""
    stop = threading.Event()

    def show() -> None:
        with tqdm(unit="step", file=sys.stderr) as bar:
            while not stop.wait(1):
                title, done, total = ray.get(progress.ask.remote())
                if title != bar.desc.removesuffix(": "):
                    bar.reset(total)
                    bar.set_description(title, refresh=False)
                bar.update(done - bar.n)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def publish(folder: str | Path, url: str) -> None:
    """Put a folder's files at a URL, the JSON last: it names a checkpoint, so it must not come before the weights."""
    for path in sorted(Path(folder).iterdir(), key=lambda p: p.suffix == ".json"):
        files.open_folder(url).write(path.name, [path.read_bytes()])


def fetch(url: str, folder: str | Path, names: tuple[str, ...]) -> Path:
    """The named files of a checkpoint as a local folder. Raises UserError if one is missing."""
    url = files.absolute(url)
    local = files.local_path(url)
    if local is not None:
        return Path(local)
    for name in names:
        try:
            (Path(folder) / name).write_bytes(files.open_folder(url).read(name))
        except FileNotFoundError:
            raise UserError(f"{url}: expected a checkpoint with {name}, found none; train it first") from None
    return Path(folder)


def read_adapter(url: str) -> tuple[BottleneckAdapter, dict[str, Any]]:
    """The adapter at a path or URL, and its record."""
    with tempfile.TemporaryDirectory() as folder:
        return BottleneckAdapter.load(fetch(url, folder, checkpoint_files("adapter")))


def load_adapter(places: Places, dataset: str, model: Model, early: Fingerprint, seed: int = 0) -> BottleneckAdapter:
    """The distilled adapter of a data set, checked against the features it was made for; or a random one, if so set.

    `seed` is a joint adapter's; one that stays random is always the same.
    """
    if model.adapter != "distilled":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if model.adapter == "joint" else 0)
            return BottleneckAdapter(early.channels, model.embedding_channels).eval()
    url = f"{places.out}/{dataset}/distill/final"
    adapter, record = read_adapter(url)
    made_for = record["of"]["encoder"]
    if (made_for["weights"], layer(made_for["layers"], "early")) != (early.weights, layer(early.layers, "early")):
        raise UserError(
            f"{url}: expected the adapter of {early.model} ({early.weights}, {layer(early.layers, 'early')}), got one "
            f"of {made_for['model']} ({made_for['weights']}, {layer(made_for['layers'], 'early')}); distil again under "
            "another --out"
        )
    return adapter


def open_embedding(places: Places, dataset: str, model: Model, late: FeatureStore, digest: str) -> FeatureStore:
    """The embeddings that the adapter of that digest made of the encoder's views that `late` holds."""
    made = late.fingerprint
    url = store_url(places.store, dataset, embedding_name(model), made.res_px)
    expect = {"feature": "embedding", "weights": digest, "grid": made.grid, "view_seed": made.view_seed}
    store = open_at(places, url, expect)
    if made.weights not in store.fingerprint.layers.split():
        raise UserError(
            f"{url}: expected embeddings of the encoder {made.weights}, got {store.fingerprint.layers}; bake them "
            "again under another --store"
        )
    return store


def layer(layers: str, feature: str) -> str:
    """What a fingerprint's `layers` says of one feature: `early=block2`."""
    return next((part for part in layers.split() if part.startswith(f"{feature}=")), layers)


def made_by(fingerprint: Fingerprint) -> str:
    """What decides a store's numbers, in one line, for a run's identity."""
    return " ".join((fingerprint.weights, fingerprint.layers, fingerprint.precision, fingerprint.dtype))


def embedding_name(model: Model) -> str:
    """The store's feature name: embeddings of a random adapter are kept apart."""
    return "embedding-random" if model.adapter == "random" else "embedding"


def set_up(config: dict[str, Any]) -> tuple[torch.device, int, int]:
    """In a worker: seed, threads and device. Returns device, rank and world size."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    workers: Workers = config["workers"]
    torch.manual_seed(workers.seed)
    # Ray sets OMP_NUM_THREADS from whole CPUs before torch is loaded; this also covers fractions.
    torch.set_num_threads(max(1, int(workers.worker_cpus)))
    return ray.train.torch.get_device(), rank, world


def autocast(computing: Computing, device: torch.device) -> AbstractContextManager:
    """bf16 autocast if the settings ask for it."""
    if computing.train_precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def from_rank_0(compute: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Numbers that rank 0 computes and every rank gets; every rank must call it."""
    if not torch.distributed.is_initialized():
        return compute()
    found: list[Any] = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0, device=ray.train.torch.get_device())
    return found[0]


class Stopwatch:
    """Seconds of work, over all the times a run was taken up."""

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


def check_resources(wanted: dict[str, float], workers: int) -> None:
    """Raise UserError if the cluster can never give each worker what it wants; Ray would wait for it for ever."""
    there = ray.cluster_resources()
    for kind, each in wanted.items():
        if each * workers > there.get(kind, 0):
            raise UserError(
                f"{workers} workers with {each:g} {kind} each: expected a cluster with {each * workers:g} {kind}, got "
                f"{there.get(kind, 0):g}; lower --workers or --worker-cpus, or take --no-gpu"
            )


def check_batch(batch: int, workers: int) -> None:
    """Raise UserError if a batch cannot be split evenly."""
    if batch % workers:
        raise UserError(f"--workers {workers}: expected a divisor of the batch {batch}")


def save_state(rank: int, metrics: dict[str, float], **state: Any) -> None:
    """Report a checkpoint of tensors and numbers from rank 0; every rank must call it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save(state, Path(folder) / "state.pt")
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


def load_state() -> dict[str, Any] | None:
    """The last checkpoint's state, None in a fresh run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


def identity_of(**sections: Any) -> dict[str, Any]:
    """Flat, comparable settings of dataclasses and plain values."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        if hasattr(value, "__dataclass_fields__"):
            flat |= asdict(value)
        else:
            flat[key] = value
    return flat


def _record(url: str) -> dict[str, Any] | None:
    try:
        return json.loads(bytes(files.open_folder(url).read("run.json")))
    except FileNotFoundError:
        return None
