"""Early and late features of the frozen encoder, once: photographs in, sealed stores out, one forward for both.

    python -m pipelines.extract_features --res 518
    python -m pipelines.extract_features --res 518 --coarse-res 126 252      # and what distillation reads, in one pass
    python -m pipelines.extract_features --res 518 --images 's3://bucket/photos/**/*.jpg'

Cost: VOC's 4,845 samples by the offline recipe took 9 minutes on two cores that other work shared, and 2.9 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from feature_store import Fingerprint, Row
from fsdino.preprocess import PREPROCESSING
from pipelines import stages
from pipelines.cli import main
from pipelines.recipes import Encoding, Extraction, Places, RecipeName


@dataclass(frozen=True)
class Settings:
    """Compute early and late features of images and their views into feature stores."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    extraction: Extraction
    features: tuple[Literal["early", "late"], ...] = ("early", "late")
    """Which features to keep."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which images; only those of train have augmented views."""
    coarse_res: tuple[int, ...] = ()
    """Further resolutions in the same pass, for distillation: early features of the training images as they are."""
    images: str | None = None
    """Photographs instead of the data set's: a folder, a glob in quotes, or either as an fsspec URL."""


class Wanted(nn.Module):
    """The encoder, computing only the features that are wanted."""

    def __init__(self, encoding: Encoding):
        super().__init__()
        self.encoder = stages.encoder_of(encoding)
        self.mean, self.std = self.encoder.mean, self.encoder.std

    def forward(self, x: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Normalised images to the features of these names."""
        if tuple(wanted) == ("early",):
            return {"early": self.encoder.early(x)}
        return self.encoder(x)._asdict()


def job(settings: Settings) -> dict[str, Any]:
    """Plan, extract, seal."""
    encoding, extraction = settings.encoding, settings.extraction
    encoder = stages.encoder_of(encoding)
    name, rows = stages.read_rows(settings.places, settings.images, settings.splits, encoding.num_views)

    def target(feature: str, res: int, rows: list[Row]) -> stages.Target:
        fingerprint = Fingerprint(
            feature=feature,
            model=encoder.name,
            weights=encoder.digest,
            layers=encoder.layers,
            res_px=res,
            grid=encoder.grid(res),
            channels=encoder.early_channels if feature == "early" else encoder.late_channels,
            view_seed=encoding.view_seed,
            preprocessing=PREPROCESSING,
            precision=extraction.precision,
            dtype=extraction.dtype,
        )
        return stages.Target(stages.store_url(settings.places.store, name, feature, res), fingerprint, rows)

    targets = [target(feature, encoding.res, rows) for feature in settings.features]
    if settings.coarse_res:
        _, plain = stages.read_rows(settings.places, settings.images, ["train"], num_views=1)
        targets += [target("early", res, plain) for res in settings.coarse_res if res != encoding.res]
    decode = stages.Decode(encoding.view_seed, extraction.on_bad_image)
    return stages.extract(lambda: Wanted(encoding), decode, targets, extraction, settings.places.tracking_uri)


if __name__ == "__main__":
    main(Settings, job)
