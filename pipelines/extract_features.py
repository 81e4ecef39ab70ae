"""Early and late features of the frozen encoder, once: photographs in, sealed stores out, one forward for both.

    python -m pipelines.extract_features --res 518
    python -m pipelines.extract_features --res 518 --coarse-res 126 252      # and what distillation reads, in one pass
    python -m pipelines.extract_features --res 518 --images SA-1B --share 0.01 --features early --coarse-res 126 252

Cost: VOC's 4,845 samples by the offline recipe took 9 minutes on two cores that other work shared, and 2.9 GB.
"""

from dataclasses import dataclass
from typing import Any, Literal

from feature_store import Row
from fsdino.data.protocols import protocol_of
from fsdino.specs import encoder_spec
from fsdino.weights import weights_digest
from pipelines import extraction, stores
from pipelines.checks import Side
from pipelines.cli import main
from pipelines.networks import EncoderPlan
from pipelines.recipes import Backbone, Benchmark, Extraction, Photographs, Places, RecipeName
from pipelines.stages import Decode


@dataclass(frozen=True)
class Settings:
    """Compute early and late features of images and their views into feature stores."""

    recipe: RecipeName
    places: Places
    photographs: Photographs
    benchmark: Benchmark
    backbone: Backbone
    extraction: Extraction
    features: tuple[Literal["early", "late"], ...] = ("early", "late")
    """Which features to keep."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which images; only those of train have augmented views."""
    coarse_res: tuple[Side, ...] = ()
    """Further resolutions in the same pass, for distillation: early features of the training images as they are."""


def job(settings: Settings) -> dict[str, Any]:
    """Plan, extract, seal."""
    backbone = settings.backbone
    spec = encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm)
    for res_px in (backbone.res, *settings.coarse_res):
        spec.grid(res_px)
    test_view = protocol_of(settings.benchmark.protocol).test_view
    name, rows = extraction.read_rows(
        settings.places, settings.photographs, settings.splits, backbone.num_views, test_view
    )
    digest = weights_digest(backbone.encoder, backbone.encoder_weights)

    def target(feature: str, res_px: int, rows: list[Row]) -> extraction.Target:
        of = settings.extraction
        fingerprint = stores.encoded_fingerprint(backbone, feature, res_px, digest, of.precision, of.dtype)
        return extraction.Target(stores.place(settings.places.store, name, fingerprint), fingerprint, rows)

    targets = [target(feature, backbone.res, rows) for feature in settings.features]
    if settings.coarse_res:
        plain = rows
        if settings.photographs.images is None:
            _, plain = extraction.read_rows(settings.places, settings.photographs, ["train"], num_views=1)
        targets += [target("early", res_px, plain) for res_px in settings.coarse_res if res_px != backbone.res]
    return extraction.extract(
        EncoderPlan(backbone, digest),
        Decode(backbone.view_seed, settings.extraction.on_bad_image),
        targets,
        settings.extraction,
        settings.places.tracking_uri,
        name,
        (extraction.photographs_input(settings.places, settings.photographs, name, rows),),
    )


if __name__ == "__main__":
    main(Settings, job)
