"""Picklable Ray operators of the extraction jobs, and the job they share: one row is one shard.

A shard is the unit of work and of retry: tasks decode images, actors compute and write shards whole. So a killed task
or actor leaves either a finished shard or none, and a new run does only what is missing. A pass may fill several
stores, of several resolutions: each image is decoded once for all its views and sizes.
"""

import functools
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError, RayTaskError
from torch import Tensor
from tqdm import tqdm

from feature_store import (
    CacheSettings,
    FeatureStore,
    Fingerprint,
    Row,
    ShardWriter,
    StoreError,
    StoreFault,
    create,
)
from feature_store.files import is_url, redacted
from feature_store.layout import num_shards, shard_rows
from feature_store.lock import locked
from fsdino.data.photographs import list_photographs, set_name
from fsdino.data.views import draw_view
from fsdino.data.voc import VocDataset
from fsdino.encoder import Encoder, build_encoder
from fsdino.errors import UserError
from fsdino.preprocess import read_image, resize_square, to_input
from pipelines import tracking
from pipelines.cli import ClusterFault
from pipelines.recipes import Computing, Encoding, Extraction, Places

Network = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""A normalised batch (or stored features) and the features that are wanted in, each as `b c g g` out."""
IMAGES_PER_ITEM = 32
WARM_UP_SECONDS = 5.0  # a first batch that took longer is not run again only to be timed


@dataclass(frozen=True)
class Target:
    """A store that a pass fills."""

    url: str
    fingerprint: Fingerprint
    rows: Sequence[Row]


class Unit(NamedTuple):
    """One shard of stores that are alike in resolution and rows."""

    shard: int
    res_px: int
    rows: tuple[Row, ...]
    urls: tuple[str, ...]
    features: tuple[str, ...]
    """Which feature each of the stores keeps."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for this process."""
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # it raises whatever it meets: RuntimeError, ConnectionError, Exception
            raise ClusterFault(error) from error
        logging.getLogger("ray.data").setLevel(logging.WARNING)


def encoder_of(encoding: Encoding) -> Encoder:
    """The frozen encoder that the settings name."""
    weights = encoding.encoder_weights
    return build_encoder(encoding.encoder, weights, early_norm=encoding.early_norm, late_norm=encoding.late_norm)


def store_url(root: str, dataset: str, feature: str, res_px: int) -> str:
    """Where a data set's feature at a resolution is kept."""
    return f"{root.rstrip('/')}/{dataset}/{feature}@{res_px}"


def open_store(places: Places, dataset: str, feature: str, encoding: Encoding, **more: Any) -> FeatureStore:
    """The store of a feature of the encoder at the resolution of `encoding`, checked for being that."""
    expect = {"feature": feature, "model": encoding.encoder, "res_px": encoding.res, "view_seed": encoding.view_seed}
    store = open_at(places, store_url(places.store, dataset, feature, encoding.res), expect | more)
    norm = encoding.early_norm if feature == "early" else encoding.late_norm
    for part in store.fingerprint.layers.split():
        if part.startswith(f"{feature}=block") and part.endswith("+norm") != norm:
            flag = f"--{feature}-norm" if norm else f"--no-{feature}-norm"
            raise UserError(f"{store.url}: {flag} does not go with its features ({part}); leave it out or extract anew")
    return store


def device_of(computing: Computing) -> torch.device:
    """The device of a job that runs in its own process. Raises UserError if a GPU is asked for and not there."""
    if computing.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: expected a CUDA device on this machine, found none; take --no-gpu")
    return torch.device("cuda" if computing.gpu else "cpu")


def open_at(places: Places, url: str, expect: dict[str, Any]) -> FeatureStore:
    """A store by its URL, behind the local cache if there is one."""
    cache = CacheSettings(places.cache, int(places.cache_gb * 1e9)) if places.cache else None
    return FeatureStore(url, expect, cache=cache)


def usable(images: Mapping[str, list[int]], *stores: FeatureStore | None) -> dict[str, list[int]]:
    """Images (with their classes) that have features in every store."""
    without = quarantined(*stores)
    return {image_id: classes for image_id, classes in images.items() if image_id not in without}


def quarantined(*stores: FeatureStore | None) -> set[str]:
    """Ids of images that any of the stores has in quarantine."""
    return {sample_id for store in stores if store is not None for sample_id, _ in store.quarantined}


def read_rows(places: Places, images: str | None, splits: Sequence[str], num_views: int) -> tuple[str, list[Row]]:
    """The name of what is to be extracted, and its rows: photographs of a place, or else splits of the data set."""
    if images is not None:
        return set_name(images), [Row(sample_id, 0, source) for sample_id, source in list_photographs(images).items()]
    dataset = VocDataset(places.data)
    return dataset.name, plan_rows(dataset, splits, num_views)


def plan_rows(dataset: VocDataset, splits: Sequence[str], num_views: int) -> list[Row]:
    """Every image of the splits under view 0, training images under the augmented views too."""
    rows: dict[tuple[str, int], Row] = {}
    for split in splits:
        views = range(num_views if split == "train" else 1)
        for image_id in dataset.ids(split):  # type: ignore[arg-type]
            source = str(dataset.image_path(image_id))
            rows |= {(image_id, view): Row(image_id, view, source) for view in views}
    return list(rows.values())


class Read(Protocol):
    """A task that brings what the network works on."""

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """An item's `units` (pickled) in, for each of them a row of `_row` out."""
        ...

    def readable(self, row: Row) -> bool:
        """Whether a row that was quarantined can be read by now."""
        ...


class Single(torch.nn.Module):
    """A network of one feature."""

    network: Any

    def __init__(self, network: Any, feature: str):
        super().__init__()
        self.network, self.feature = network, feature
        self.mean, self.std = getattr(network, "mean", None), getattr(network, "std", None)

    def forward(self, x: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """See Network."""
        return {self.feature: self.network(x)}


class Decode:
    """Task: the pixels of an item's images, square, under each view and at each size that its units want."""

    def __init__(self, view_seed: int, on_bad_image: str):
        self.view_seed, self.on_bad_image = view_seed, on_bad_image

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """`units` in; for each of them a row of `_row`, its pixels (n, r, r, 3), out; or one row with the error."""
        try:
            yield from self._decode(pickle.loads(item["units"]))
        except (UserError, StoreError) as error:
            yield _error_row(error)

    def _decode(self, units: list[Unit]) -> Iterator[dict[str, Any]]:
        pixels = [np.zeros((len(unit.rows), unit.res_px, unit.res_px, 3), np.uint8) for unit in units]
        sizes = [np.zeros((len(unit.rows), 2), np.int32) for unit in units]
        bad: list[dict[int, str]] = [{} for _ in units]
        wanted: dict[str, list[tuple[int, int]]] = {}
        for number, unit in enumerate(units):
            for slot, row in enumerate(unit.rows):
                wanted.setdefault(row.source, []).append((number, slot))
        for source, places in wanted.items():  # one decoded photograph in memory at a time
            try:
                image = read_image(source)
            except UserError as error:
                reason = str(error).replace(source, redacted(source))
                if not is_url(source) and not os.path.isdir(os.path.dirname(source)):
                    raise StoreFault(
                        f"{os.path.dirname(source)}: the folder is gone; see to it and run again"
                    ) from None
                if self.on_bad_image == "fail":
                    raise UserError(reason) from None
                for number, slot in places:
                    bad[number][slot] = reason
                continue
            except OSError as error:
                reason = str(error).replace(source, redacted(source))
                raise StoreFault(f"{redacted(source)}: {reason}; see to it and run the same command again") from None
            for number, slot in places:
                row = units[number].rows[slot]
                view = draw_view(self.view_seed, row.sample_id, row.view)
                pixels[number][slot] = resize_square(view.image(image), units[number].res_px)
                sizes[number][slot] = image.size
        for number, unit in enumerate(units):
            yield _row(unit, bad[number], pixels[number], sizes[number])

    def readable(self, row: Row) -> bool:
        """See Read."""
        try:
            read_image(row.source)
        except (UserError, OSError):
            return False
        return True


class ReadStored:
    """Task: stored features in the place of pixels; quarantined samples stay so."""

    def __init__(self, url: str):
        self.url = url

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As Decode, the pixels (n, g, g, c) being features; sizes and reasons as the store's manifest has them."""
        try:
            yield from self._read(pickle.loads(item["units"]))
        except StoreError as error:
            yield _error_row(error)

    def _read(self, units: list[Unit]) -> Iterator[dict[str, Any]]:
        store = _opened(self.url)
        number = {(sample.sample_id, sample.view): row for row, sample in enumerate(store.samples)}
        for unit in units:
            rows = [number[row[:2]] for row in unit.rows]
            reasons = {slot: store.quarantined.get(row[:2]) for slot, row in enumerate(unit.rows)}
            bad = {slot: reason for slot, reason in reasons.items() if reason is not None}
            yield _row(unit, bad, np.nan_to_num(store.read(rows)), np.array([store.sizes[row] for row in rows]))

    def readable(self, row: Row) -> bool:
        """See Read."""
        return row[:2] not in _opened(self.url).quarantined


@functools.cache
def _opened(url: str) -> FeatureStore:
    """A store, opened once in a process."""
    return FeatureStore(url)


def _row(unit: Unit, bad: dict[int, str], pixels: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """From a task to an actor: what Arrow knows nothing of is pickled."""
    return {"unit": pickle.dumps((unit, bad)), "pixels": pixels, "sizes": sizes}


def _error_row(error: Exception) -> dict[str, Any]:
    """An error as a row, since Ray Data would lose what it is; the driver raises it."""
    return {
        "unit": pickle.dumps(error),
        "pixels": np.zeros((0, 1, 1, 3), np.uint8),
        "sizes": np.zeros((0, 2), np.int32),
    }


class Compute:
    """Actor: the network over a shard, then the shard and its marker into every store.

    Ray calls it from two threads, so that one shard is written while the next is computed; a thread of its own runs
    the network.
    """

    def __init__(self, build: Callable[[], Network], makings: Mapping[str, str], settings: Extraction):
        self.makings = makings
        self.thread = ThreadPoolExecutor(1)
        self.forward: Forward = self.thread.submit(Forward, build, settings).result()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one unit; returns images and bytes written, and (pickled) quarantined ids with their reasons.

        Or, in the place of those, an error.
        """
        try:
            images, written, said = self._write(batch)
        except (UserError, StoreError) as error:
            images, written, said = 0, 0, error
        counts = {"images": np.array([images]), "bytes": np.array([written])}
        return counts | {"bad": np.array([pickle.dumps(said)], object)}

    @functools.cached_property
    def writers(self) -> dict[str, ShardWriter]:
        """Of each store; opened at the first shard, where an error can still be told."""
        writers = {url: ShardWriter(url) for url in self.makings}
        for url, making in self.makings.items():
            if writers[url].making != making:
                raise StoreError(f"{url}: it has been made anew since this job began; stop this job")
        return writers

    def _write(self, batch: dict[str, np.ndarray]) -> tuple[int, int, Any]:
        loaded = pickle.loads(batch["unit"][0])
        if isinstance(loaded, Exception):
            raise loaded
        unit, bad = loaded
        writers = self.writers
        pixels, sizes = batch["pixels"][0], batch["sizes"][0]
        wanted = tuple(dict.fromkeys(unit.features))
        features = self.thread.submit(self.forward, pixels, wanted).result()
        sized = [(int(w), int(h)) for w, h in sizes]
        written = sum(
            writers[url].write(unit.shard, features[name], sized, bad)
            for url, name in zip(unit.urls, unit.features, strict=True)
        )
        return len(pixels), written, {unit.rows[slot].sample_id: reason for slot, reason in bad.items()}


class Forward:
    """The network on its device: whole shards in, features as arrays out."""

    def __init__(self, build: Callable[[], Network], settings: Extraction):
        torch.set_num_threads(max(1, int(settings.actor_cpus)))
        self.device = torch.device("cuda" if settings.actor_gpus else "cpu")
        self.network, self.settings = build(), settings
        if isinstance(self.network, torch.nn.Module):
            self.network.to(self.device)
            if settings.compile:
                self.network.compile()

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Pixels (n, r, r, 3) uint8 or stored features (n, g, g, c) in, wanted features (n, g, g, c) out."""
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for start in range(0, len(pixels), self.settings.forward_batch):
            part = np.array(pixels[start : start + self.settings.forward_batch])
            if part.dtype == np.uint8:
                x = to_input(part, self.network.mean, self.network.std)  # type: ignore[attr-defined]
            else:
                x = torch.from_numpy(part).movedim(-1, 1).float()
            half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
            with torch.autocast(self.device.type, half) if half else nullcontext():
                features = self.network(x.to(self.device), wanted)
            for name in wanted:
                outputs[name].append(features[name].float().movedim(1, -1).cpu().numpy())
        return {name: np.concatenate(parts) for name, parts in outputs.items()}


def plan_items(targets: Sequence[Target], missing: Mapping[str, Sequence[int]]) -> list[list[Unit]]:
    """The missing shards of each store, as units, grouped by the images they need.

    32 images make a group, and a unit belongs to the group of its first row. So each image is decoded once for all its
    views and resolutions, or twice where a shard reaches into the next group.
    """
    order: dict[str, int] = {}
    for target in targets:
        for row in target.rows:
            order.setdefault(row.source, len(order))
    merged: dict[tuple[int, int, tuple[Row, ...]], list[Target]] = {}
    for target in targets:
        for shard in missing[target.url]:
            inside = shard_rows(shard, len(target.rows))
            rows = tuple(target.rows[inside.start : inside.stop])
            merged.setdefault((shard, target.fingerprint.res_px, rows), []).append(target)
    items: dict[int, list[Unit]] = {}
    for (shard, res_px, rows), alike in merged.items():
        urls, features = tuple(t.url for t in alike), tuple(t.fingerprint.feature for t in alike)
        group = order[rows[0].source] // IMAGES_PER_ITEM
        items.setdefault(group, []).append(Unit(shard, res_px, rows, urls, features))
    return [items[group] for group in sorted(items)]


def extract(
    build: Callable[[], Network],
    read: Read,
    targets: Sequence[Target],
    settings: Extraction,
    tracking_uri: str,
) -> dict[str, Any]:
    """Fill the stores and seal them.

    Prints the plan, shows progress, does only the shards that some store lacks. Images that cannot be read are
    quarantined up to `settings.max_bad_share` of them; one that was mended since is read again. Returns counts for the
    summary; a run that computed anything is also in MLflow's experiment `extract`.
    """
    started = time.perf_counter()
    writers = {target.url: create(target.url, target.fingerprint, target.rows) for target in targets}
    bad: dict[str, str] = {}
    samples = {(target.fingerprint.res_px, row[:2]) for target in targets for row in target.rows}
    done: dict[str, Any] = {"stores": list(writers), "samples": len(samples)}
    if all(writer.sealed() and not writer.missing() for writer in writers.values()):
        for writer in writers.values():
            bad |= {writer.rows[row].sample_id: reason for row, reason in writer.seal().items()}
        print(f"nothing to do: {', '.join(writers)}", file=sys.stderr)
        return {**done, "computed": 0, "bytes": 0, "quarantined": len(bad), "seconds": 0.0}
    with ExitStack() as stack:
        locks = [stack.enter_context(locked(writers[url].folder)) for url in sorted(writers)]
        # Once more, as another job may have been there until the locks were ours.
        writers = {target.url: create(target.url, target.fingerprint, target.rows) for target in targets}
        for target in targets:
            bad |= known_bad(writers[target.url], target.rows, read)
        missing = {url: writer.missing() for url, writer in writers.items()}
        items = plan_items(targets, missing)
        computed, written = sum(len(unit.rows) for units in items for unit in units), 0
        show_plan(build, read, writers, missing, items, settings)
        images = len({row.source for target in targets for row in target.rows})
        for url, writer in writers.items():
            if missing[url] and writer.sealed():  # after a repair that was stopped half-way
                writer.unseal()
        name = "+".join(f"{target.fingerprint.feature}@{target.fingerprint.res_px}" for target in targets)
        tags = {f"store.{t.fingerprint.feature}.{t.fingerprint.res_px}": str(asdict(t.fingerprint)) for t in targets}
        params = asdict(settings) | {"samples": done["samples"]}
        with tracking.running(tracking_uri, "extract", name, params, tags) as run:
            check_bad(bad, images, settings)
            with tqdm(total=computed, unit="img", desc="extracting", mininterval=1) as bar:
                makings = {url: writer.making for url, writer in writers.items()}
                for row in compute(build, read, makings, items, settings) if items else ():
                    bar.update(int(row["images"]))
                    written += int(row["bytes"])
                    said = pickle.loads(row["bad"])
                    if isinstance(said, Exception):
                        raise said
                    bad |= said
                    check_bad(bad, images, settings)
                    for lock in locks:
                        lock.check()
            for lock in locks:
                lock.beat()
                lock.check()
            for writer in writers.values():
                writer.seal()
            seconds = round(time.perf_counter() - started, 1)
            run.log(0, computed=computed, bytes=written, quarantined=len(bad), seconds=seconds)
    for sample_id, reason in sorted(bad.items()):
        print(f"quarantined {sample_id!r}: {reason}", file=sys.stderr)
    return {**done, "computed": computed, "bytes": written, "quarantined": len(bad), "seconds": seconds}


def compute(
    build: Callable[[], Network],
    read: Read,
    makings: Mapping[str, str],
    items: Sequence[list[Unit]],
    settings: Extraction,
) -> Iterator[dict[str, Any]]:
    """The Ray Data job: what `Compute` returns, for each unit as it is finished. `makings` are the writers'.

    Raises ClusterFault if Ray itself breaks down; finished shards stay.
    """
    connect()
    try:
        check_cluster(settings)
    except (RayError, ConnectionError) as error:
        raise ClusterFault(error) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_items([{"units": pickle.dumps(units)} for units in items], override_num_blocks=len(items))
    # Tasks and actors ask for different amounts, else Ray Data would run the former inside the latter.
    decoded = data.flat_map(read, num_cpus=settings.decode_cpus)
    finished = decoded.map_batches(
        Compute,
        batch_size=1,
        compute=ActorPoolStrategy(
            size=settings.actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=settings.actor_cpus,
        num_gpus=settings.actor_gpus,
        fn_constructor_args=(build, makings, settings),
    )
    try:
        yield from finished.iter_rows()
    except RayTaskError:
        raise  # an error of ours inside a worker
    except (RayError, ConnectionError) as error:
        raise ClusterFault(error) from error


def check_cluster(settings: Extraction) -> None:
    """Raise UserError if the cluster can never run the actors and one decoding task beside them."""
    there = ray.cluster_resources()
    wanted = {"CPU": settings.actors * settings.actor_cpus + settings.decode_cpus}
    wanted["GPU"] = settings.actors * settings.actor_gpus
    for kind, amount in wanted.items():
        if amount > there.get(kind, 0):
            raise UserError(
                f"{settings.actors} actors and a decoding task: expected a cluster with {amount:g} {kind}, got "
                f"{there.get(kind, 0):g}; lower --actors, --actor-cpus, --actor-gpus or --decode-cpus"
            )


def known_bad(writer: ShardWriter, rows: Sequence[Row], read: Read) -> dict[str, str]:
    """Images that an earlier run quarantined, and why. Shards with one that can be read by now become missing.

    `rows` are this job's, as the data may have moved since the plan was written.
    """
    shards = sorted(set(range(num_shards(len(rows)))) - set(writer.missing()))
    bad: dict[Row, tuple[int, str]] = {}
    for shard, marker in writer.markers(shards).items():
        if marker is None:
            writer.forget(shard)
        else:
            inside = shard_rows(shard, len(rows))
            bad |= {rows[inside[slot]]: (shard, reason) for slot, reason in marker.quarantine.items()}
    with ThreadPoolExecutor() as pool:
        mended = [row for row, good in zip(bad, pool.map(read.readable, bad), strict=True) if good]
    again = {bad[row][0] for row in mended}
    for shard in again:
        writer.forget(shard)
    return {row.sample_id: reason for row, (shard, reason) in bad.items() if shard not in again}


def check_bad(bad: Mapping[str, str], images: int, settings: Extraction) -> None:
    """Raise UserError if more images than allowed are quarantined."""
    if len(bad) > settings.max_bad_share * images:
        first = next(iter(bad.values()))
        raise UserError(
            f"{len(bad)} of {images} images cannot be read, more than --max-bad-share {settings.max_bad_share:g} "
            f"(the first: {first}); mend or remove them, or raise the share, and run the same command again"
        )


def show_plan(
    build: Callable[[], Network],
    read: Read,
    writers: Mapping[str, ShardWriter],
    missing: Mapping[str, Sequence[int]],
    items: Sequence[Sequence[Unit]],
    settings: Extraction,
) -> None:
    """Say what is to be done, before it is begun."""
    for url, writer in writers.items():
        shards, rows = num_shards(len(writer.rows)), len(writer.rows)
        todo = sum(len(shard_rows(shard, rows)) for shard in missing[url])
        size = writer.nbytes / rows * todo
        print(
            f"{url}: {rows} samples, {shards - len(missing[url])} of {shards} shards done, "
            f"{todo} samples to compute, {size / 1e9:.2f} GB to write",
            file=sys.stderr,
        )
    images = len({row.source for units in items for unit in units for row in unit.rows})
    seconds = estimate(build, read, items, settings) if items else 0.0
    about = "as the progress bar will tell" if seconds is None else f"about {timedelta(seconds=max(1, round(seconds)))}"
    print(f"{images} images to read, time {about}", file=sys.stderr)


def estimate(
    build: Callable[[], Network],
    read: Read,
    items: Sequence[Sequence[Unit]],
    settings: Extraction,
) -> float | None:
    """Seconds for all units, from one batch of each resolution here; None if only the actors have a GPU."""
    if settings.actor_gpus and not torch.cuda.is_available():
        return None
    threads = torch.get_num_threads()
    forward = Forward(build, replace(settings, compile=False))
    batch = settings.forward_batch if settings.actor_gpus else 1
    seconds = 0.0
    units = [unit for item in items for unit in item]
    for res_px in {unit.res_px for unit in units}:
        alike = [unit for unit in units if unit.res_px == res_px]
        sample = alike[0]._replace(rows=alike[0].rows[:batch])
        wanted = tuple(dict.fromkeys(sample.features))
        started = time.perf_counter()
        row = next(iter(read({"units": pickle.dumps([sample])})))
        loaded, pixels = pickle.loads(row["unit"]), row["pixels"]
        if isinstance(loaded, Exception):
            raise loaded
        reading, started = time.perf_counter() - started, time.perf_counter()
        forward(pixels, wanted)
        computing = time.perf_counter() - started
        if computing < WARM_UP_SECONDS:
            started = time.perf_counter()
            forward(pixels, wanted)
            computing = time.perf_counter() - started
        seconds += (reading + computing) / len(sample.rows) * sum(len(unit.rows) for unit in alike)
    torch.set_num_threads(threads)
    return seconds / settings.actors
