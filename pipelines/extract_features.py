"""Early and late features of the frozen encoder, once: photographs in, two sealed stores out, one forward for both.

    python -m pipelines.extract_features --res 518
    python -m pipelines.extract_features --res 252 --features early --splits train --num-views 1   # for distillation

Cost: VOC's 4,845 samples by the offline recipe took 9 minutes on two cores that other work shared, and 2.9 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from feature_store import Fingerprint
from fsdino.data.voc import VocDataset
from fsdino.encoder import Encoder, build_encoder
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


class Selected(nn.Module):
    """The encoder, giving only the features that are kept."""

    def __init__(self, encoding: Encoding, features: Sequence[str]):
        super().__init__()
        self.encoder: Encoder = build_encoder(encoding.encoder, encoding.encoder_weights)
        self.mean, self.std, self.features = self.encoder.mean, self.encoder.std, features

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images to features, in the order of `features`."""
        out = self.encoder(x)
        return [getattr(out, name) for name in self.features]


def job(settings: Settings) -> dict[str, Any]:
    """Plan, extract, seal."""
    dataset, encoding = VocDataset(settings.places.data), settings.encoding
    encoder = build_encoder(encoding.encoder, encoding.encoder_weights)
    targets = {}
    for feature in settings.features:
        url = stages.store_url(settings.places.store, dataset.name, feature, encoding.res)
        targets[url] = Fingerprint(
            feature=feature,
            model=encoder.name,
            weights=encoder.digest,
            layers=encoder.layers,
            res_px=encoding.res,
            grid=encoder.grid(encoding.res),
            channels=encoder.early_channels if feature == "early" else encoder.late_channels,
            view_seed=encoding.view_seed,
            preprocessing=PREPROCESSING,
            precision=settings.extraction.precision,
        )
    rows = stages.plan_rows(dataset, settings.splits, encoding.num_views)
    decode = stages.DecodeShard(encoding.res, encoding.view_seed)

    def build() -> Selected:
        return Selected(encoding, settings.features)

    return stages.extract(build, decode, targets, rows, settings.extraction, settings.places.tracking_uri)


if __name__ == "__main__":
    main(Settings, job)
