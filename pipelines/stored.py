"""Features of a user's photographs that stores hold already, so that the encoder need not run for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store import FeatureStore
from feature_store.storage import open_folder
from fsdino.data.photographs import file_stamps, list_photographs, same_file, set_name
from fsdino.data.views import PLAIN
from fsdino.errors import UserError
from pipelines import geo, stores
from pipelines.recipes import Backbone

if TYPE_CHECKING:
    import torch

FEATURES = ("late", "early")
EXPECTED = ("feature", "model", "weights", "layer", "norm", "res_px", "view_seed", "preprocessing")


class StoredFeatures:
    """Late and early features by the photographs' paths, as `annotate --keep-features` kept them."""

    def __init__(self, root: str, places: Sequence[str], record: dict[str, Any]):
        """Those of all photographs in the places (folders, globs, URLs) that have the size in bytes that they had then,
        for a checkpoint's encoder.

        Raises UserError if there are none.
        """
        backbone, weights = Backbone(**record["backbone"]), record["late"]["weights"]
        prints = [stores.encoded_fingerprint(backbone, feature, backbone.res, weights) for feature in FEATURES]
        self._at: dict[str, tuple[FeatureStore, FeatureStore, int, int]] = {}
        for place in places:
            urls = [stores.place(root, set_name(place), one) for one in prints]
            if all(open_folder(url).names("") for url in urls):
                late, early = (
                    FeatureStore(url, {field: getattr(one, field) for field in EXPECTED})
                    for url, one in zip(urls, prints, strict=True)
                )
                self._add(late, early, list_photographs(place))
        if not self._at:
            raise UserError(
                f"--store {root}: expected features of the photographs at {urls[0]}, found none; "
                "`annotate --keep-features` of the same folder keeps them"
            )

    def _add(self, late: FeatureStore, early: FeatureStore, photographs: dict[str, str]) -> None:
        ids, views = list(photographs), [PLAIN] * len(photographs)
        now, bad = file_stamps(list(photographs.values())), late.quarantined | early.quarantined
        rows = zip(late.samples.find(ids, views), early.samples.find(ids, views), late.stamps(ids, views), strict=True)
        for (sample_id, path), (of_late, of_early, then) in zip(photographs.items(), rows, strict=True):
            if of_late is None or of_early is None or (sample_id, PLAIN) in bad:
                continue
            if Path(path).suffix.lower() in geo.SUFFIXES:  # predict reads the bands of those otherwise
                continue
            if same_file(then or "", now.get(path, ""), moved=True):
                self._at[path] = late, early, of_late, of_early

    def __contains__(self, path: str) -> bool:
        return path in self._at

    def read(self, paths: Sequence[str], device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
        """Late and early features (b, c, g, g) of photographs. Raises StoreError on damage."""
        import torch

        late, early = [], []
        for path in paths:
            late_store, early_store, of_late, of_early = self._at[path]
            late.append(channels_first(late_store, [of_late], device))
            early.append(channels_first(early_store, [of_early], device))
        return torch.cat(late), torch.cat(early)


def channels_first(store: FeatureStore, rows: Sequence[int], device: "torch.device") -> "torch.Tensor":
    """Samples (b, c, g, g) float32; zeros for those in quarantine."""
    import torch

    return torch.from_numpy(np.nan_to_num(store.read(rows))).movedim(-1, 1).float().to(device)
