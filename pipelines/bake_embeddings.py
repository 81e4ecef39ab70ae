"""The frozen adapter's output, once: the early store and the adapter in, a sealed embedding store out.

    python -m pipelines.bake_embeddings --recipe offline

The segmenter trains on these 256 channels and never reads `early`. `--adapter random` bakes a random adapter instead,
for the ablation; the embeddings of each adapter have a place of their own.
"""

from dataclasses import dataclass
from typing import Any

from feature_store import Fingerprint
from fsdino.config import SegmenterConfig
from fsdino.errors import UserError
from pipelines import checkpoints, datasets, extraction, stores
from pipelines.checks import Place
from pipelines.cli import main
from pipelines.networks import BakePlan
from pipelines.recipes import Backbone, Extraction, Places, RecipeName, Teaching
from pipelines.stages import ReadStored


@dataclass(frozen=True)
class Settings:
    """Bake the adapter's embeddings of every early feature into a feature store."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    extraction: Extraction
    model: SegmenterConfig
    adapter_checkpoint: Place | None = None
    """Folder, path or URL, of an adapter, or of a segmenter whose adapter is meant, instead of the adapter that was
    distilled on this data set."""


def job(settings: Settings) -> dict[str, Any]:
    """Plan, bake, seal."""
    if settings.model.adapter == "joint":
        raise UserError("--adapter joint: it learns from early features, so there is nothing to bake; train it")
    places, backbone = settings.places, settings.backbone
    dataset = datasets.dataset_of(places)
    early = stores.open_encoded(places, dataset.name, "early", backbone, backbone.res)
    of = early.fingerprint
    adapter = checkpoints.plan_adapter(
        places, dataset.name, backbone, settings.teaching, settings.model, of.weights, settings.adapter_checkpoint
    )
    fingerprint = Fingerprint(
        feature="embedding",
        model=stores.adapter_model(backbone.encoder, adapter.digest),
        weights=adapter.digest,
        layer="widen",
        norm="none",
        res_px=of.res_px,
        grid=of.grid,
        channels=adapter.out_channels,
        view_seed=of.view_seed,
        preprocessing=of.preprocessing,
        precision=settings.extraction.precision,
        dtype=settings.extraction.dtype,
        made_from=of,
    )
    return extraction.extract(
        BakePlan(adapter),
        ReadStored(early.url, of),
        [extraction.Target(stores.place(places.store, dataset.name, fingerprint), fingerprint, early.samples)],
        settings.extraction,
        places.tracking_uri,
        dataset.name,
        stores.inputs((early,), "training"),
    )


if __name__ == "__main__":
    main(Settings, job)
