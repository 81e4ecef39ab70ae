"""An annotation job: what it is, which of its shards are missing or of other photographs by now, and running them.

Operators of the Ray Data job are in annotating.py.
"""

import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

from feature_store import FeatureStore, Row
from feature_store.lock import locked
from feature_store.storage import Folder, open_folder
from feature_store.urls import redacted_text
from fsdino.data.photographs import file_stamps
from fsdino.errors import UserError
from pipelines import annotating, cluster, extraction, ray_messages, stores
from pipelines.annotating import AnnotationJob, WrittenShard
from pipelines.networks import EncoderPlan
from pipelines.outbox import Outbox
from pipelines.outcome import Outcome
from pipelines.recipes import Backbone, Extraction
from pipelines.runs import About, Input
from pipelines.stages import Decode, Item, Loaded, Unit
from pipelines.stored import FEATURES

IDENTITY = "annotation.json"


@dataclass(frozen=True)
class Plan:
    """Photographs in shards, and what they become."""

    out: str
    rows: Sequence[Row]
    shard_images: int
    identity: dict[str, Any]
    """What makes two annotations the same but for the photographs, as JSON."""

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.rows) // self.shard_images)

    def inside(self, shard: int) -> tuple[Row, ...]:
        """The photographs of a shard."""
        return tuple(self.rows[shard * self.shard_images : (shard + 1) * self.shard_images])

    @functools.cached_property
    def digests(self) -> list[str]:
        """Of each shard's photographs: their ids and sizes in bytes, as far as these can be told."""
        stamps = file_stamps([row.source for row in self.rows])
        listed = [f"{row.sample_id} {stamps.get(row.source, '').split(' ')[0]}\n" for row in self.rows]
        size = self.shard_images
        return [
            hashlib.sha256("".join(listed[at : at + size]).encode()).hexdigest()[:16]
            for at in range(0, len(listed), size)
        ]


def written(plan: Plan) -> dict[int, WrittenShard]:
    """Shards that are written, and of the photographs as they are.

    Raises UserError if the folder holds another annotation.
    """
    folder, digests = open_folder(plan.out), plan.digests
    check_identity(folder, plan.identity)
    there = sorted(annotating.finished(plan.out))
    with ThreadPoolExecutor(16) as pool:
        markers = list(pool.map(lambda shard: annotating.marker(plan.out, shard), there))
    whole = [one for one in markers if one is not None]
    current = {one.shard: one for one in whole if one.shard < len(digests) and one.photographs == digests[one.shard]}
    if others := len(there) - len(current):
        print(f"note: {others} shards are damaged, or of photographs that have changed since", file=sys.stderr)
    return current


def check_identity(folder: Folder, identity: Mapping[str, Any]) -> None:
    """Raise UserError if the folder holds another annotation."""
    try:
        there = json.loads(bytes(folder.read(IDENTITY)))
    except FileNotFoundError:
        return
    except ValueError:
        raise UserError(f"{folder.url}/{IDENTITY}: expected JSON, got a damaged file; choose another --to") from None
    other = next((key for key in identity if there.get(key) != identity[key]), None)
    if other is not None:
        raise UserError(
            f"{folder.url}: holds annotations with another {other} ({there.get(other)}, now {identity[other]}); choose "
            "another --to"
        )


def features(
    backbone: Backbone, weights: str, rows: Sequence[Row], listed: Input, store: str, of: Extraction, tracking_uri: str
) -> tuple[FeatureStore, FeatureStore]:
    """Stores of late and early features of the photographs, computed as far as they are not there, or are of
    photographs that have changed since."""
    prints = [stores.encoded_fingerprint(backbone, f, backbone.res, weights, of.precision, of.dtype) for f in FEATURES]
    targets = [extraction.Target(stores.place(store, listed.name, kept), kept, rows) for kept in prints]
    read = Decode(backbone.view_seed, of.on_bad_image)
    fresh, network = replace(of, refresh=True), EncoderPlan(backbone, weights)
    extraction.extract(network, read, targets, fresh, tracking_uri, listed.name, (listed,))
    late, early = (FeatureStore(target.url) for target in targets)
    return late, early


def annotate(
    plan: Plan, job: AnnotationJob, todo: Sequence[int], res_px: int, of: Extraction, about: About, tracking_uri: str
) -> float:
    """Annotate shards; returns photographs a second.

    Raises UserError if more photographs than allowed cannot be read, a task's or an actor's error, and ClusterFault.
    """
    from pipelines import tracking

    folder, total = open_folder(plan.out), sum(len(plan.inside(shard)) for shard in todo)
    listed = {row.sample_id for row in plan.rows}
    with locked(folder) as lock:
        check_identity(folder, plan.identity)
        folder.create(IDENTITY, json.dumps(plan.identity, sort_keys=True).encode())
        done = written(plan)
        bad = {image_id: reason for one in done.values() for image_id, reason in one.bad.items()}
        for other in annotating.finished(plan.out) - set(done):
            for name in annotating.files(other):  # the marker comes first
                folder.delete(name)
        times, images, told = list[tuple[float, int]](), 0, 0.0
        with (
            tracking.running(tracking_uri, about, outbox=Outbox(plan.out)) as run,
            closing(extraction.Progress(total, of, "annotating")) as progress,
            cluster.watched(progress.lose),
        ):
            started = time.perf_counter()
            for shard in _run(plan, job, todo, res_px, of):
                progress.add(shard.images + len(shard.bad))
                images, bad = images + shard.images + len(shard.bad), bad | shard.bad
                progress.log_lost(run)
                times.append((time.perf_counter() - started, images))
                if times[-1][0] > told + extraction.TOLD_EVERY_SECONDS:
                    told = times[-1][0]
                    run.log(images, images_per_second=rate(times, of.actors))
                    run.flush()
                extraction.check_bad(bad, listed, len(plan.rows), of)
                lock.check()
            run.log(images, seconds=times[-1][0], quarantined=len(bad))
    for image_id, reason in sorted(bad.items()):
        print(f"left out {image_id!r}: {redacted_text(reason)}", file=sys.stderr)
    return rate(times, of.actors)


def rate(times: Sequence[tuple[float, int]], actors: int) -> float:
    """Photographs a second, of (seconds, photographs so far) after each shard: from when every actor has written one,
    as starting is no part of it; with the start, if there are not so many shards."""
    (seconds, images), behind = times[-1], min(actors, len(times)) - 1
    if len(times) - 1 > behind:
        return (images - times[behind][1]) / max(seconds - times[behind][0], 1e-9)
    return images / max(seconds, 1e-9)


def tell(of_second: float, actors: int, photographs: int, price: float | None) -> None:
    """Say what all photographs take, and cost."""
    seconds = photographs / max(of_second, 1e-9)
    actor_hours = seconds / 3600 * actors
    cost = "" if price is None else f", {actor_hours * price:.2f} at {price:g} an hour"
    print(
        f"{of_second:.1f} photographs a second with {actors} actors: {photographs} take "
        f"{timedelta(seconds=round(seconds))}, {actor_hours:.2f} actor-hours{cost}",
        file=sys.stderr,
    )


def pixels_digest(image: Any, mask: np.ndarray) -> str:
    """Of a support: its pixels and its mask."""
    data = f"{image.size} {mask.shape}".encode() + image.tobytes() + mask.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _run(plan: Plan, job: AnnotationJob, todo: Sequence[int], res_px: int, of: Extraction) -> Iterator[WrittenShard]:
    """The Ray Data job: each shard as it is written."""
    cluster.connect(*extraction.demands(of))
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray_messages.divert_loggers()
    ray.data.DataContext.get_current().enable_progress_bars = False
    units = [Unit(shard, res_px, rows, (), (), ("",) * len(rows)) for shard in todo if (rows := plan.inside(shard))]
    if job.stores is None:
        items = ray.data.from_items([{"item": Item((unit,))} for unit in units], override_num_blocks=len(units))
        loaded = items.flat_map(Decode(0, of.on_bad_image), num_cpus=of.decode_cpus)
    else:
        nothing = {"pixels": np.zeros((0, 1, 1, 3), np.uint8), "sizes": np.zeros((0, 2), np.int32)}
        known = [{"outcome": Outcome(value=Loaded(unit, {}, [])), **nothing} for unit in units]
        loaded = ray.data.from_items(known, override_num_blocks=len(units))
    segmented = loaded.map_batches(
        annotating.Segment,
        batch_size=1,
        compute=ActorPoolStrategy(size=of.actors),
        num_cpus=of.actor_cpus,
        num_gpus=of.actor_gpus,
        fn_constructor_args=(job,),
    )
    # Without cores of their own, or decoding ahead would keep finished shards from being written.
    written = segmented.map_batches(
        annotating.Write(job), batch_size=1, compute=TaskPoolStrategy(of.actors), num_cpus=0
    )
    with cluster.faults():
        for row in written.iter_rows():
            yield row["outcome"].get()
