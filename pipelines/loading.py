"""Episodes as tensors: features from the stores, labels from the data set under the same views."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fsdino import paper
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import Episode, EpisodeSampler
from fsdino.data.views import PADDED, PLAIN, draw_view
from fsdino.episodic import EpisodeBatch

A = TypeVar("A")
B = TypeVar("B")
MASKS_KEPT = 8192  # 160 kB each at 400 px


class Features(Protocol):
    """Where features are read: a store, or an encoder at work (live.py)."""

    def rows(self, sample_ids: Sequence[str], views: Sequence[int]) -> np.ndarray:
        """Features (n, g, g, c) of images under their views."""
        ...


class EpisodeLoader:
    """Reads any episode; masks under a view are kept in memory, the most recent ones.

    `query` has what queries bring besides `late`: `embedding`, or `early`. Without `query_labels` the queries' masks
    are left out, for tests, which score at another size.

    A mirrored image is its mirrored features and mask: right up to the network's own left-right asymmetries.
    """

    def __init__(
        self,
        dataset: Dataset,
        late: Features,
        query: Features | None,
        view_seed: int,
        label_px: int,
        query_labels: bool = True,
        void_is_background: bool = False,
    ):
        self.dataset, self.late, self.query, self.label_px = dataset, late, query, label_px
        self.view_seed, self.query_labels, self.void_is_background = view_seed, query_labels, void_is_background
        self._masks: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()

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
        first = 0 if self.query_labels else 1
        late, labels = _mirror(late, flips), _mirror(self._masks_of(ids, episodes, first), flips[:, first:])
        return EpisodeBatch(
            episodes=episodes,
            support_late=late[:, 1:],
            support_masks=labels[:, 1 - first :] == 1,
            query_late=late[:, 0],
            query_input=query_input,
            query_labels=None if first else self._for_loss(labels[:, 0]),
        )

    def ahead(self, batches: Iterable[Sequence[Episode]]) -> Iterator[EpisodeBatch]:
        """Batches of episodes, each read while the one before it is in use."""
        return ahead(self.load, batches)

    def batches(
        self,
        sampler: EpisodeSampler,
        batches: Iterable[Sequence[int]],
        threads: int = 1,
        depth: int = 1,
        pinned: bool = False,
    ) -> Iterator[EpisodeBatch]:
        """Batches of the episodes of these indices, drawn and read by `threads`, up to `depth` batches ahead; `pinned`:
        in page-locked memory."""

        def read(indices: Sequence[int]) -> EpisodeBatch:
            batch = self.load([sampler.episode(i) for i in indices])
            return batch.pinned() if pinned else batch

        return ahead(read, batches, threads, depth)

    def _for_loss(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(labels == paper.VOID, 0) if self.void_is_background else labels

    def _masks_of(self, ids: list[list[str]], episodes: Sequence[Episode], first: int) -> Tensor:
        masks = [
            [self.mask(i, v, e.class_id) for i, v in zip(row[first:], e.views[first:], strict=True)]
            for row, e in zip(ids, episodes, strict=True)
        ]
        return torch.from_numpy(np.array(masks))

    def mask(self, image_id: str, view: int, class_id: int) -> np.ndarray:
        """A class's mask under a view, at the network's side."""
        key = (image_id, view, class_id)
        mask = self._masks.pop(key, None)
        if mask is None:
            drawn, whole = draw_view(self.view_seed, image_id, view), self.dataset.mask(image_id, class_id)
            mask = drawn.label(whole, self.label_px)
            if view in (PLAIN, PADDED) and not (mask == 1).any():
                _mark(mask, whole, drawn.extent(whole.shape))
        self._masks[key] = mask
        if len(self._masks) > MASKS_KEPT:
            self._masks.popitem(last=False)
        return mask


def ahead(read: Callable[[A], B], wanted: Iterable[A], threads: int = 1, depth: int = 1) -> Iterator[B]:
    """What `read` makes of one after another, in their order; threads read up to `depth` items ahead."""
    pool, coming = ThreadPoolExecutor(threads), deque[Future[B]]()
    try:
        for one in wanted:
            coming.append(pool.submit(read, one))
            if len(coming) > depth:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _mark(small: np.ndarray, whole: np.ndarray, extent: tuple[int, ...]) -> None:
    """Mark one pixel of an object that is too small for the side, if there is one: a support shows something."""
    places = np.argwhere(whole == 1)
    if len(places):
        y, x = places[len(places) // 2] * small.shape // np.array(extent)
        small[y, x] = 1


def _channels_first(features: np.ndarray) -> Tensor:
    return torch.from_numpy(features).movedim(-1, 1)


def _mirror(x: Tensor, flips: Tensor) -> Tensor:
    """Left and right exchanged (last axis) where `flips` is true; `flips` has the leading axes of `x`."""
    if flips.any():
        x[flips] = x[flips].flip(-1)
    return x
