"""Features computed as they are asked for, straight from images: for tests on data that nothing was extracted of."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsdino.adapter import BottleneckAdapter
from fsdino.data.dataset import Dataset
from fsdino.data.views import draw_view
from fsdino.encoder import Encoder, build_encoder, to_input
from fsdino.preprocess import resize_square
from pipelines.recipes import Backbone

KEPT = 64  # images of which features are kept, 6 MB each at full size
BATCH = 8


@dataclass(frozen=True)
class LiveFeatures:
    """One kind of features of a data set, read as from a store."""

    source: "LiveEncoder"
    name: str

    def rows(self, sample_ids: Sequence[str], views: Sequence[int]) -> np.ndarray:
        """Features (n, g, g, c) of images under their views."""
        return self.source.rows(self.name, list(zip(sample_ids, views, strict=True)))


class LiveEncoder:
    """Encoder and adapter on a data set's images; `early`, `late` and `embedding` of an image come of one forward."""

    def __init__(
        self,
        encoder: Encoder,
        adapter: BottleneckAdapter | None,
        dataset: Dataset,
        backbone: Backbone,
        device: torch.device,
    ):
        self.encoder, self.adapter = encoder, None if adapter is None else adapter.to(device)
        self.dataset, self.backbone, self.device = dataset, backbone, device
        self._kept: OrderedDict[tuple[str, int], dict[str, np.ndarray]] = OrderedDict()

    def rows(self, name: str, wanted: list[tuple[str, int]]) -> np.ndarray:
        """One kind of features (n, g, g, c) of images under their views."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._kept]
        for at in range(0, len(missing), BATCH):
            self._compute(missing[at : at + BATCH])
        found = np.stack([self._kept[key][name] for key in wanted])
        for key in dict.fromkeys(wanted):
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    @torch.inference_mode()
    def _compute(self, keys: list[tuple[str, int]]) -> None:
        seed, side = self.backbone.view_seed, self.backbone.res
        pixels = np.stack([resize_square(draw_view(seed, i, v).image(self.dataset.image(i)), side) for i, v in keys])
        x = to_input(pixels, self.encoder.mean, self.encoder.std).to(self.device)
        found = dict(self.encoder(x)._asdict())
        if self.adapter is not None:
            found["embedding"] = self.adapter(found["early"])
        for position, key in enumerate(keys):
            self._kept[key] = {name: _last(value[position]) for name, value in found.items()}


def _last(features: Tensor) -> np.ndarray:
    """Channels last, as stores have them."""
    return features.movedim(0, -1).float().cpu().numpy()


def blank(encoder: Encoder, res_px: int) -> Tensor:
    """A black image as the encoder's input, (1, 3, res_px, res_px) float on the CPU."""
    return to_input(np.zeros((1, res_px, res_px, 3), np.uint8), encoder.mean, encoder.std)


def built(backbone: Backbone, device: torch.device) -> Encoder:
    """The backbone's encoder on a device."""
    encoder = build_encoder(
        backbone.encoder, backbone.encoder_weights, early_norm=backbone.early_norm, late_norm=backbone.late_norm
    )
    encoder.to(device)  # type: ignore[attr-defined]
    return encoder
