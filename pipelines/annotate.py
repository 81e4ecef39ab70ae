"""Masks of your own classes for a folder of photographs, or for millions of them on a cluster.

    python -m pipelines.annotate --images photos/ --class cat.class --class dog.class --to annotations
    python -m pipelines.annotate --images s3://bucket/photos/ --class cat.class --to s3://bucket/cats --actor-gpus 1
    python -m pipelines.annotate --images photos/ --class cat.class --to cats --keep-features

Writes shards: part-000000.parquet (rows for each photograph and class) and part-000000.coco.json. Killed at any moment,
rerun the same command to resume; photographs that cannot be read are listed and left out, and those that have changed
since are annotated again. With `--keep-features` the next classes cost no encoder. `--trial 64` annotates that many and
says what all would take.
"""

import hashlib
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import fsspec
import tyro

from feature_store import Row
from feature_store.schema import text
from feature_store.urls import is_url, redacted
from fsdino.data.photographs import list_photographs, set_name
from fsdino.data.views import PLAIN
from fsdino.errors import UserError, reachable
from pipelines import checkpoints, cluster, extraction
from pipelines.checks import Count, Output, Place, Range, TrackingUri, Weights
from pipelines.cli import main
from pipelines.examples import Examples, named_classes, registered
from pipelines.recipes import Backbone, Extraction
from pipelines.runs import About, Input

if TYPE_CHECKING:
    from pipelines.annotating import WrittenShard

LIST, FORMAT = ".txt", 1


@dataclass(frozen=True)
class Settings:
    """Find classes in many photographs."""

    images: Place
    """Photographs: a folder, a glob in quotes, a tar archive or a folder of them, a .txt file with a path or URL on
    each line, or any of these as an fsspec URL."""
    classes: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="class")]
    """A class: a file that `register` wrote; or its name, and PHOTOGRAPH=MASK of each support. Once for each class."""
    to: Output
    """Folder for the annotations: a path that every node sees, or any fsspec URL."""
    checkpoint: Place | None = None
    """Checkpoint folder of train_episodic (its `final`); none: the one that comes with the project."""
    mask_value: Annotated[int, Range(0, 255)] | None = None
    """The object's value in masks of several classes; their 255 is then neither object nor background."""
    instances: bool = False
    """Each connected part of a mask as an object of its own."""
    shard_images: Count = 256
    """Photographs in each shard."""
    keep_features: bool = False
    """Keep the encoder's features as stores below --store, and read them from there: further classes, or other
    examples, then cost no encoder."""
    store: Output = "outputs/stores"
    """Root of the feature stores."""
    trial: Count | None = None
    """Annotate the shards of so many photographs alone, and say what all of them would take."""
    price: Annotated[float, Range(0, 1e6)] | None = None
    """What an hour of one actor costs, for the estimate."""
    tracking_uri: TrackingUri = "sqlite:///outputs/mlflow.db"
    """MLflow: sqlite:///FILE or the http address of a server."""
    encoder_weights: Weights | None = None
    """A local weights file instead of the publisher's."""
    work: Extraction = field(default_factory=Extraction)


def job(settings: Settings) -> dict[str, Any]:
    """Check everything, then annotate what is missing, shard after shard."""
    of = settings.work
    if of.refresh:
        raise UserError("--refresh: leave it out; photographs that have changed are annotated again anyway")
    wanted = named_classes(settings.classes, settings.mask_value)
    record = checkpoints.read_record(checkpoints.chosen(settings.checkpoint), "segmenter")
    rows = [Row(image_id, PLAIN, source) for image_id, source in photographs(settings.images).items()]
    from pipelines import annotation

    identity = identity_of(settings, record, wanted)
    plan = annotation.Plan(settings.to, rows, settings.shard_images, identity)
    asked = range(plan.shards if settings.trial is None else min(plan.shards, -(-settings.trial // plan.shard_images)))
    done = annotation.written(plan)
    todo = [shard for shard in asked if shard not in done]
    bad = {image_id: reason for shard in done.values() for image_id, reason in shard.bad.items()}
    extraction.check_bad(bad, {row.sample_id for row in rows}, len(rows), of)
    if not todo:
        print(f"nothing to do: {settings.to}", file=sys.stderr)
        return summary(settings, [one.name for one in wanted], done.values(), plan.shards)
    print(
        f"{settings.to}: {len(rows)} photographs in {plan.shards} shards, {len(todo)} of them to do, "
        f"{len(wanted)} classes",
        file=sys.stderr,
    )
    backbone = Backbone(**record["backbone"])
    backbone = replace(backbone, encoder_weights=settings.encoder_weights or backbone.encoder_weights)
    needs = cluster.Needs((settings.to,), (rows[0].source,), ((backbone.encoder, backbone.encoder_weights),))
    cluster.prepare(*extraction.demands(of), needs)
    from pipelines.annotating import AnnotationJob

    predictor = checkpoints.load_predictor(checkpoints.chosen(settings.checkpoint), settings.encoder_weights)
    classes = tuple(registered(one, predictor) for one in wanted)
    predictor.check(classes)
    name, kept = set_name(settings.images), None
    if settings.keep_features:
        some = rows[: len(asked) * plan.shard_images]
        weights = record["late"]["weights"]
        listed = Input(name, checkpoints.short_digest([row.sample_id for row in some]), settings.images, "test", {})
        kept = annotation.features(backbone, weights, some, listed, settings.store, of, settings.tracking_uri)
    operators = AnnotationJob(
        checkpoint=settings.checkpoint,
        encoder_weights=settings.encoder_weights,
        classes=classes,
        out=settings.to,
        shard_images=plan.shard_images,
        digests=tuple(plan.digests),
        instances=settings.instances,
        stores=kept,
        gpu=of.actor_gpus > 0,
        threads=max(1, int(of.actor_cpus)),
        forward_batch=of.forward_batch,
        precision=of.precision,
        compile=of.compile,
    )
    names = [one.name for one in classes]
    params = {"classes": ", ".join(names), "checkpoint": settings.checkpoint or "the project's own"}
    params |= {"to": settings.to, "shards": str(len(todo))}
    listed = Input(name, checkpoints.short_digest(plan.digests), settings.images, "test", {"photographs": len(rows)})
    about = About("annotate", name, "+".join(names), params, (listed,))
    speed = annotation.annotate(plan, operators, todo, backbone.res, of, about, settings.tracking_uri)
    annotation.tell(speed, of.actors, len(rows), settings.price)
    return summary(settings, names, annotation.written(plan).values(), plan.shards)


def photographs(place: str) -> dict[str, str]:
    """Photographs by their ids: paths below the folder, or the lines of a list. Raises UserError if there are none."""
    if not place.endswith(LIST):
        return {text(image_id): source for image_id, source in list_photographs(place).items()}
    try:
        with reachable(f"--images {place}"), fsspec.open(place, "rt", encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        raise UserError(f"--images {place}: expected a list of photographs, found no file") from None
    except UnicodeDecodeError:
        raise UserError(f"--images {place}: expected a list in UTF-8, got another encoding; save it as UTF-8") from None
    found = {text(redacted(line)): line if is_url(line) else os.path.abspath(line) for line in lines if line}
    if not found:
        raise UserError(f"--images {place}: expected a path or URL on each line, got none")
    return found


def identity_of(settings: Settings, record: dict[str, Any], wanted: Sequence[Examples]) -> dict[str, Any]:
    """What makes two annotations the same but for the photographs, as JSON."""
    return {
        "format": FORMAT,
        "checkpoint": record["sha256"],
        "classes": [[one.name, digest_of(one)] for one in wanted],
        "images": set_name(settings.images),
        "shard_images": settings.shard_images,
        "instances": settings.instances,
        "precision": settings.work.precision,
        "features": settings.work.dtype if settings.keep_features else "none kept",
    }


def digest_of(one: Examples) -> str:
    """Of a class file, or of a class's photographs and masks."""
    from pipelines import annotation

    if one.file:
        return hashlib.sha256(Path(one.file).read_bytes()).hexdigest()[:16]
    pairs = zip(one.photographs(), one.masks, strict=True)
    return checkpoints.short_digest([annotation.pixels_digest(image, mask) for image, mask in pairs])


def summary(settings: Settings, names: Sequence[str], done: "Collection[WrittenShard]", shards: int) -> dict[str, Any]:
    """What the markers say of all shards that are there."""
    return {
        "annotations": settings.to,
        "shards": f"{len(done)} of {shards}",
        "photographs": sum(shard.images for shard in done),
        "found": {name: sum(shard.found[name] for shard in done) for name in names},
        "left_out": sum(len(shard.bad) for shard in done),
    }


if __name__ == "__main__":
    main(Settings, job)
