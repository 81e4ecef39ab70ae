"""Where stores lie, and opening them for what they must be."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from feature_store import CacheSettings, FeatureStore, Fingerprint
from feature_store.schema import COMMANDS
from fsdino.data.photographs import same_file
from fsdino.errors import UserError
from fsdino.preprocess import PREPROCESSING
from fsdino.specs import encoder_spec, teacher_spec
from pipelines import checkpoints
from pipelines.recipes import Backbone, Places
from pipelines.runs import Input

T = TypeVar("T")


def place(root: str, dataset: str, fingerprint: Fingerprint) -> str:
    """Where a data set's features are kept."""
    return at(root, dataset, fingerprint.model, fingerprint.feature, fingerprint.res_px)


def at(root: str, dataset: str, model: str, feature: str, res_px: int) -> str:
    """As `place`, from its parts: two encoders, or two adapters, live side by side."""
    return f"{root.rstrip('/')}/{dataset}/{model}/{feature}@{res_px}"


def encoded_fingerprint(
    backbone: Backbone, feature: str, res_px: int, digest: str, precision: str = "fp32", dtype: str = "float32"
) -> Fingerprint:
    """Of the encoder's `early` or `late` features at a resolution, for weights of that digest."""
    spec = encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm)
    layer = spec.early if feature == "early" else spec.late
    return Fingerprint(
        feature=feature,
        model=spec.name,
        weights=digest,
        layer=layer.name,
        norm=layer.norm,
        res_px=res_px,
        grid=spec.grid(res_px),
        channels=layer.channels,
        view_seed=backbone.view_seed,
        preprocessing=PREPROCESSING,
        precision=precision,
        dtype=dtype,
    )


def adapter_model(encoder: str, digest: str) -> str:
    """What the embeddings of an adapter are filed under."""
    return f"{encoder}-adapter-{digest[:8]}"


def open_encoded(places: Places, dataset: str, feature: str, backbone: Backbone, res_px: int) -> FeatureStore:
    """The encoder's `early` or `late` features at a resolution, checked for being those."""
    spec = encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm)
    spec.grid(res_px)
    layer = spec.early if feature == "early" else spec.late
    expect = {
        "feature": feature,
        "model": spec.name,
        "layer": layer.name,
        "norm": layer.norm,
        "res_px": res_px,
        "view_seed": backbone.view_seed,
    }
    return _open(places, at(places.store, dataset, spec.name, feature, res_px), expect)


def open_teacher(places: Places, dataset: str, teacher: str, res_px: int) -> FeatureStore:
    """The teacher's embeddings for students at a resolution; one store for all of them if the teacher takes one side
    alone."""
    spec = teacher_spec(teacher)
    side = spec.input_px(res_px)
    expect = {"feature": "teacher", "model": teacher, "layer": spec.layer.name, "res_px": side}
    return _open(places, at(places.store, dataset, teacher, "teacher", side), expect)


def open_embedding(places: Places, dataset: str, digest: str, backbone: Backbone, late: FeatureStore) -> FeatureStore:
    """The embeddings that the adapter of that digest computed from the encoder's views that `late` holds.

    This and the other `open_` functions raise StoreError if the store is missing, unfinished or something else.
    """
    of, layer = late.fingerprint, encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm).early
    baked_from = {
        "feature": "early",
        "model": of.model,
        "weights": of.weights,
        "layer": layer.name,
        "norm": layer.norm,
        "res_px": of.res_px,
    }
    expect = {
        "feature": "embedding",
        "weights": digest,
        "grid": of.grid,
        "view_seed": of.view_seed,
        "made_from": baked_from,
    }
    return _open(places, at(places.store, dataset, adapter_model(of.model, digest), "embedding", of.res_px), expect)


def without_quarantined(images: Mapping[str, T], stores: Iterable[FeatureStore | None]) -> dict[str, T]:
    """Images that have features in every store."""
    bad = {sample_id for store in stores if store is not None for sample_id, _ in store.quarantined}
    return {image_id: classes for image_id, classes in images.items() if image_id not in bad}


def check_images(images: Iterable[str], view: int, *opened: FeatureStore) -> None:
    """Raise UserError if a store lacks one of the images under a view, or was computed from another photograph than the
    first."""
    images = list(images)
    stamps = [store.stamps(images, [view] * len(images)) for store in opened]
    for image_id, *of_stores in zip(images, *stamps, strict=True):
        for store, stamp in zip(opened, of_stores, strict=True):
            command = f"`python -m pipelines.{COMMANDS[store.fingerprint.feature]}"
            if stamp is None:
                raise UserError(f"{store.url}: image {image_id!r} is not in it; run {command}`, which adds it")
            if not same_file(stamp, of_stores[0], moved=True):
                raise UserError(
                    f"{store.url}: image {image_id!r} is another photograph than in {opened[0].url}; run {command} "
                    "--refresh`"
                )


def sizes_of(store: FeatureStore, images: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(width, height) that photographs had when they were encoded."""
    rows = store.samples.of_images(images)
    return {store.samples[row].sample_id: (int(w), int(h)) for row, (w, h) in zip(rows, store.sizes[rows], strict=True)}


def check_weights(store: FeatureStore, digest: str) -> None:
    """Raise UserError if a store was computed with other weights."""
    if store.fingerprint.weights != digest:
        raise UserError(
            f"{store.url}: expected features of the weights {digest}, got {store.fingerprint.weights}; "
            "name the file that computed them, or another --store"
        )


def inputs(opened: Iterable[FeatureStore | None], context: str) -> tuple[Input, ...]:
    """Stores as MLflow lists what a run read."""
    found = []
    for store in filter(None, opened):
        of = asdict(store.fingerprint)
        profile = {**of, "samples": len(store.samples), "quarantined": len(store.quarantined)}
        name = f"{store.fingerprint.feature}@{store.fingerprint.res_px}"
        found.append(Input(name, checkpoints.short_digest(of), store.url, context, profile))
    return tuple(found)


def _open(places: Places, url: str, expect: dict[str, Any]) -> FeatureStore:
    """A store, behind the local cache if there is one."""
    cache = CacheSettings(places.cache, int(places.cache_gb * 1e9)) if places.cache else None
    return FeatureStore(url, expect, cache=cache)
