"""Episodes as tensors: features from the stores, labels from the data set under the same views."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from feature_store import FeatureStore
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import Episode, EpisodeSampler
from fsdino.data.masks import binary_label
from fsdino.data.views import draw_view
from fsdino.episodic import EpisodeBatch

LABELS_KEPT = 8192  # 160 kB each at 400 px


class EpisodeLoader:
    """Reads any episode; labels under a view are kept in memory, the most recent ones.

    `query` is the store of what queries bring besides `late`: `embedding`, or `early`.

    A mirrored image is its mirrored features and label: right up to the network's own left-right asymmetries.
    """

    def __init__(self, dataset: Dataset, late: FeatureStore, query: FeatureStore | None, label_px: int):
        self.dataset, self.late, self.query, self.label_px = dataset, late, query, label_px
        self.view_seed = late.fingerprint.view_seed
        self._labels: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def load(self, episodes: Sequence[Episode]) -> EpisodeBatch:
        """The episodes as one batch; all have the same number of shots."""
        ids = [[e.query, *e.supports] for e in episodes]
        flat_ids, flat_views = [i for row in ids for i in row], [v for e in episodes for v in e.views]
        flips = torch.tensor([e.flips for e in episodes])
        late = _channels_first(self.late.rows(flat_ids, flat_views)).unflatten(0, flips.shape)
        query_input = None
        if self.query is not None:
            queries = self.query.rows([e.query for e in episodes], [e.views[0] for e in episodes])
            query_input = _mirror(_channels_first(queries), flips[:, 0])
        late, labels = _mirror(late, flips), _mirror(torch.from_numpy(self._labels_of(ids, episodes)), flips)
        return EpisodeBatch(
            episodes=episodes,
            support_late=late[:, 1:],
            support_masks=labels[:, 1:] == 1,
            query_late=late[:, 0],
            query_input=query_input,
            query_labels=labels[:, 0],
        )

    def batches(self, sampler: EpisodeSampler, batches: Iterator[Sequence[int]]) -> Iterator[EpisodeBatch]:
        """Batches of the episodes of these indices, each read while the one before it is in use."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for indices in batches:
                following = pool.submit(self.load, [sampler.episode(i) for i in indices])
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _labels_of(self, ids: list[list[str]], episodes: Sequence[Episode]) -> np.ndarray:
        return np.array(
            [
                [binary_label(self._label(i, v), e.class_id) for i, v in zip(row, e.views, strict=True)]
                for row, e in zip(ids, episodes, strict=True)
            ]
        )

    def _label(self, image_id: str, view: int) -> np.ndarray:
        key = (image_id, view)
        label = self._labels.pop(key, None)
        if label is None:
            label = draw_view(self.view_seed, image_id, view).label(self.dataset.label(image_id), self.label_px)
        self._labels[key] = label
        if len(self._labels) > LABELS_KEPT:
            self._labels.popitem(last=False)
        return label


def _channels_first(features: np.ndarray) -> Tensor:
    return torch.from_numpy(features).movedim(-1, 1)


def _mirror(x: Tensor, flips: Tensor) -> Tensor:
    """Left and right exchanged (last axis) where `flips` is true; `flips` has the leading axes of `x`."""
    return torch.where(flips.view(*flips.shape, *[1] * (x.ndim - flips.ndim)), x.flip(-1), x)
