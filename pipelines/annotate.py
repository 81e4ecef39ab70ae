"""Masks of your own classes for a folder of photographs, or for millions of them on a cluster.

    python -m pipelines.annotate --images photos/ --class cat.class --class dog.class --to annotations
    python -m pipelines.annotate --images s3://bucket/photos/ --class cat.class --to s3://bucket/cats --actor-gpus 1
    python -m pipelines.annotate --images photos/ --class cat.class --to cats --keep-features


Writes shards: part-000000.parquet (a row for each photograph and class) and part-000000.coco.json. Killed at any
moment, it resumes where it was when the command is rerun; photographs that cannot be read are listed and left out.
With `--keep-features` the next classes cost no encoder. `--trial 64` annotates that many and says what all would take.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from typing import Annotated as Also

import fsspec
import numpy as np
import tyro

from feature_store import FeatureStore, Row
from feature_store.lock import Lock, locked
from feature_store.schema import text
from feature_store.storage import Folder, open_folder
from feature_store.urls import redacted_text
from fsdino.data.photographs import file_stamps, list_photographs, set_name
from fsdino.data.views import PLAIN
from fsdino.errors import UserError, reachable
from pipelines import checkpoints, cluster, extraction, stores
from pipelines.checks import Count, Output, Place, Range, TrackingUri, Weights
from pipelines.cli import main
from pipelines.examples import Examples, read_classes, registered
from pipelines.networks import EncoderPlan
from pipelines.outbox import Outbox
from pipelines.outcome import Outcome
from pipelines.recipes import Backbone, Extraction
from pipelines.runs import About, Input
from pipelines.stages import Decode, Item, Loaded, Unit

if TYPE_CHECKING:
    from pipelines.annotating import Annotated, AnnotationJob

IDENTITY, FORMAT = "annotation.json", 1
FEATURES = ("late", "early")
LIST = ".txt"


@dataclass(frozen=True)
class Settings:
    """Find classes in many photographs."""

    images: Place
    """Photographs: a folder, a glob in quotes, a tar archive or a folder of them, a .txt file with a path or URL on
    each line, or any of these as an fsspec URL."""
    classes: Also[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="class")]
    """A class: a file that `register` wrote; or its name, and PHOTOGRAPH=MASK of each support. Once for each class."""
    to: Output
    """Folder for the annotations: a path that every node sees, or any fsspec URL."""
    checkpoint: Place | None = None
    """Checkpoint folder of train_episodic (its `final`); none: the one that comes with the project."""
    mask_value: Also[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    instances: bool = False
    """Each connected part of a mask as an object of its own."""
    shard_images: Count = 256
    """Photographs in each shard."""
    keep_features: bool = False
    """Keep the encoder's features as stores below --store, and read them from there: further classes, or other
    examples, then cost no encoder. The photographs are named by their paths below the folder."""
    store: Output = "outputs/stores"
    """Root of the feature stores."""
    trial: Count | None = None
    """Annotate the shards of so many photographs alone, and say what all of them would take."""
    price: Also[float, Range(0, 1e6)] | None = None
    """What an hour of one actor costs, for the estimate."""
    tracking_uri: TrackingUri = "sqlite:///outputs/mlflow.db"
    """MLflow: sqlite:///FILE or the http address of a server."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""
    cluster: Extraction = field(default_factory=Extraction)


def job(settings: Settings) -> dict[str, Any]:
    """Check everything, then annotate what is missing, shard after shard."""
    wanted = read_classes(settings.classes, settings.mask_value)
    _check_names([one.name for one in wanted])
    record = checkpoints.read_record(checkpoints.chosen(settings.checkpoint), "segmenter")
    sources = photographs(settings.images)
    rows = [Row(image_id, PLAIN, source) for image_id, source in sources.items()]
    folder, identity = open_folder(settings.to), identity_of(settings, record, wanted, sources)
    _check_identity(folder, identity, create=False)
    from pipelines import annotating

    shards = -(-len(rows) // settings.shard_images)
    asked = range(shards if settings.trial is None else min(shards, -(-settings.trial // settings.shard_images)))
    missing = sorted(set(asked) - annotating.finished(settings.to))
    if missing:
        print(
            f"{settings.to}: {len(rows)} photographs in {shards} shards, {len(missing)} of them to do, "
            f"{len(wanted)} classes",
            file=sys.stderr,
        )
        needs = cluster.Needs(
            (settings.to,), (rows[0].source,), ((record["backbone"]["encoder"], settings.encoder_weights),)
        )
        cluster.prepare(*extraction.demands(settings.cluster), needs)
        with locked(folder) as lock:
            _check_identity(folder, identity, create=True)
            _annotate(settings, record, wanted, rows, missing, lock)
    else:
        print(f"nothing to do: {settings.to}", file=sys.stderr)
    return _summary(settings, [one.name for one in wanted], shards)


def photographs(place: str) -> dict[str, str]:
    """Photographs by their ids: paths below the folder, or the lines of a list. Raises UserError if there are none."""
    if not place.endswith(LIST):
        return list_photographs(place)
    try:
        with reachable(f"--images {place}"), fsspec.open(place, "rt") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        raise UserError(f"--images {place}: expected a list of photographs, found no file") from None
    found = {line: line for line in lines if line}
    if not found:
        raise UserError(f"--images {place}: expected a path or URL on each line, got none")
    return found


def identity_of(
    settings: Settings, record: dict[str, Any], wanted: Sequence[Examples], sources: dict[str, str]
) -> dict[str, Any]:
    """What makes two annotations the same, as JSON."""
    listed = hashlib.sha256("\n".join(sources).encode(errors="surrogateescape")).hexdigest()[:16]
    return {
        "format": FORMAT,
        "checkpoint": record["sha256"],
        "classes": {one.name: _digest(one) for one in wanted},
        "photographs": len(sources),
        "list": listed,
        "shard_images": settings.shard_images,
        "instances": settings.instances,
        "precision": settings.cluster.precision,
        "features": settings.cluster.dtype if settings.keep_features else "images",
    }


def _digest(one: Examples) -> str:
    digest = hashlib.sha256()
    if one.file:
        with open(one.file, "rb") as file:
            digest.update(file.read())
    for source, mask in zip(one.supports, one.masks, strict=True):
        digest.update(file_stamps([source])[source].split(" ")[0].encode() + mask.tobytes())
    return digest.hexdigest()[:16]


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise UserError("--class: expected at least one class, got none")
    for number, name in enumerate(names):
        if not name.strip() or name in names[:number]:
            raise UserError(f"--class {name}: expected names that tell the classes apart; register it with another")


def _check_identity(folder: Folder, identity: dict[str, Any], create: bool) -> None:
    """Raises UserError if the folder holds other annotations."""
    data = json.dumps(identity, sort_keys=True).encode()
    try:
        there = json.loads(bytes(folder.read(IDENTITY)))
    except FileNotFoundError:
        if create:
            folder.create(IDENTITY, data)
        return
    other = next((key for key in identity if there.get(key) != identity[key]), None)
    if other is not None:
        raise UserError(
            f"{folder.url}: holds annotations with another {other} ({there.get(other)}, now {identity[other]}); choose "
            "another --to"
        )


def _annotate(
    settings: Settings,
    record: dict[str, Any],
    wanted: Sequence[Examples],
    rows: list[Row],
    missing: list[int],
    lock: Lock,
) -> None:
    """Annotate the missing shards."""
    from pipelines import annotating, tracking

    of, name = settings.cluster, set_name(settings.images)
    backbone = Backbone(**record["backbone"])
    backbone = replace(backbone, encoder_weights=settings.encoder_weights or backbone.encoder_weights)
    predictor = checkpoints.load_predictor(checkpoints.chosen(settings.checkpoint), settings.encoder_weights)
    classes = tuple(registered(one, predictor) for one in wanted)
    predictor.check(classes)
    ids = [text(row.sample_id) for row in rows]
    inputs = (Input(name, checkpoints.short_digest(ids), settings.images, "test", {"photographs": len(rows)}),)
    kept = None
    if settings.keep_features:
        kept = _features(settings, backbone, record["late"]["weights"], rows, name, inputs)
    annotation = annotating.AnnotationJob(
        settings.checkpoint,
        settings.encoder_weights,
        classes,
        settings.to,
        settings.shard_images,
        settings.instances,
        kept,
        of.actor_gpus > 0,
        max(1, int(of.actor_cpus)),
        of.forward_batch,
    )
    names = [one.name for one in wanted]
    params = {
        "classes": ", ".join(names),
        "checkpoint": settings.checkpoint or "the project's own",
        "to": settings.to,
        "shards": len(missing),
    }
    about = About("annotate", name, "+".join(names), params, inputs)
    size = settings.shard_images
    total = sum(len(rows[shard * size : (shard + 1) * size]) for shard in missing)
    bad, listed, done, times = dict[str, str](), set(ids), 0, list[tuple[float, int]]()
    with (
        tracking.running(settings.tracking_uri, about, outbox=Outbox(settings.to)) as run,
        closing(extraction.Progress(total, of, "annotating")) as progress,
        cluster.watched(progress.lose),
    ):
        started = time.perf_counter()
        for shard in _run(annotation, backbone.res, rows, missing, of):
            images = shard.images + len(shard.bad)
            progress.add(images)
            done, bad = done + images, bad | shard.bad
            times.append((time.perf_counter() - started, done))
            run.log(done, images_per_second=_rate(times))
            run.flush()
            extraction.check_bad(bad, listed, len(rows), of)
            lock.check()
        run.log(done, seconds=times[-1][0], quarantined=len(bad))
    _tell(settings, _rate(times), len(rows))
    for image_id, reason in sorted(bad.items()):
        print(f"left out {image_id!r}: {redacted_text(reason)}", file=sys.stderr)


def _rate(times: Sequence[tuple[float, int]]) -> float:
    """Photographs a second since the first shard was written, as starting is no part of it; of one shard, with it."""
    (first, behind), (last, done) = times[0], times[-1]
    return (done - behind) / (last - first) if len(times) > 1 else done / last


def _features(
    settings: Settings, backbone: Backbone, weights: str, rows: list[Row], name: str, inputs: tuple[Input, ...]
) -> tuple[FeatureStore, FeatureStore]:
    """Stores of late and early features of the photographs, computed as far as they are not there."""
    of = settings.cluster
    prints = [stores.encoded_fingerprint(backbone, f, backbone.res, weights, of.precision, of.dtype) for f in FEATURES]
    targets = [extraction.Target(stores.place(settings.store, name, kept), kept, rows) for kept in prints]
    read = Decode(backbone.view_seed, of.on_bad_image)
    extraction.extract(EncoderPlan(backbone, weights), read, targets, of, settings.tracking_uri, name, inputs)
    late, early = (FeatureStore(target.url) for target in targets)
    return late, early


def _run(
    annotation: "AnnotationJob", res_px: int, rows: Sequence[Row], missing: Sequence[int], of: Extraction
) -> "Iterator[Annotated]":
    """The Ray Data job: each shard as it is written. Raises a task's or an actor's error, and ClusterFault."""
    cluster.connect(*extraction.demands(of))
    import ray.data
    from ray.data import ActorPoolStrategy

    from pipelines import annotating

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    size = annotation.shard_images
    inside = {shard: tuple(rows[shard * size : (shard + 1) * size]) for shard in missing}
    units = [Unit(shard, res_px, of_shard, (), (), ("",) * len(of_shard)) for shard, of_shard in inside.items()]
    if annotation.stores is None:
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
        fn_constructor_args=(annotation,),
    )
    written = segmented.map_batches(annotating.Write(annotation), batch_size=1, num_cpus=of.decode_cpus)
    with cluster.faults():
        for row in written.iter_rows():
            yield row["outcome"].get()


def _tell(settings: Settings, rate: float, photographs: int) -> None:
    """Say what all photographs take, and cost."""
    seconds = photographs / max(rate, 1e-9)
    actor_hours = seconds / 3600 * settings.cluster.actors
    cost = "" if settings.price is None else f", {actor_hours * settings.price:.2f} at {settings.price:g} an hour"
    print(
        f"{rate:.1f} photographs a second with {settings.cluster.actors} actors: {photographs} take "
        f"{timedelta(seconds=round(seconds))}, {actor_hours:.2f} actor-hours{cost}",
        file=sys.stderr,
    )


def _summary(settings: Settings, names: Sequence[str], shards: int) -> dict[str, Any]:
    """What the markers say of all shards that are there."""
    from pipelines import annotating

    done = sorted(annotating.finished(settings.to))
    with ThreadPoolExecutor(16) as pool:
        markers = list(pool.map(lambda shard: annotating.marker(settings.to, shard), done))
    found = {name: sum(marker.found[name] for marker in markers) for name in names}
    return {
        "annotations": settings.to,
        "shards": f"{len(done)} of {shards}",
        "photographs": sum(marker.images for marker in markers),
        "found": found,
        "left_out": sum(len(marker.bad) for marker in markers),
    }


if __name__ == "__main__":
    main(Settings, job)
