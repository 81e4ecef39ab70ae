"""The frozen adapter's output, once: the early store and the adapter in, a sealed embedding store out.

    python -m pipelines.bake_embeddings --recipe offline

The segmenter trains on these 256 channels and never reads `early`. `--adapter random` bakes a random adapter instead
(store `embedding-random`), for the ablation.
"""

from dataclasses import dataclass
from typing import Any

from feature_store import Fingerprint
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from fsdino.weights import state_digest
from pipelines import stages, training
from pipelines.cli import main
from pipelines.recipes import Encoding, Extraction, Model, Places, RecipeName


@dataclass(frozen=True)
class Settings:
    """Bake the adapter's embeddings of every early feature into a feature store."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    extraction: Extraction
    model: Model


def job(settings: Settings) -> dict[str, Any]:
    """Plan, bake, seal."""
    if settings.model.adapter == "joint":
        raise UserError("--adapter joint: such an adapter learns from early features; nothing is to be baked, train it")
    dataset, res = VocDataset(settings.places.data), settings.encoding.res
    early = stages.open_store(settings.places, dataset.name, "early", settings.encoding)
    adapter = training.load_adapter(settings.places, dataset.name, settings.model, early.fingerprint)
    if adapter.widen.out_channels != settings.model.embedding_channels:
        raise UserError(
            f"--embedding-channels {settings.model.embedding_channels}: the adapter was distilled to "
            f"{adapter.widen.out_channels} channels, its teacher's; give that number"
        )
    made_of = early.fingerprint
    target = Fingerprint(
        feature="embedding",
        model=f"adapter on {made_of.model}",
        weights=state_digest(adapter),
        layers=f"adapter of {made_of.weights} {made_of.layers} in {made_of.precision}, stored as {made_of.dtype}",
        res_px=res,
        grid=made_of.grid,
        channels=settings.model.embedding_channels,
        view_seed=made_of.view_seed,
        preprocessing=made_of.preprocessing,
        precision=settings.extraction.precision,
        dtype=settings.extraction.dtype,
    )
    destination = stages.store_url(settings.places.store, dataset.name, training.embedding_name(settings.model), res)
    return stages.extract(
        lambda: stages.Single(adapter, "embedding"),
        stages.ReadStored(early.url),
        [stages.Target(destination, target, early.samples)],
        settings.extraction,
        settings.places.tracking_uri,
    )


if __name__ == "__main__":
    main(Settings, job)
