"""Episodes as tensors: features from the stores, labels from the data set under the same views."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fsdino import paper
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import Episode, EpisodeSampler
from fsdino.data.views import PADDED, PLAIN, draw_view
from fsdino.episodic import EpisodeBatch
from pipelines.feeding import CPU, GB, Features, Kept, feeds, to_device

A = TypeVar("A")
B = TypeVar("B")
MASKS_GB = 1.5  # 160 kB each at 400 px


class EpisodeLoader:
    """Reads any episode onto a device. Features and masks under a view are kept, as many as fit: features there up to
    `device_gb`, else in memory up to `memory_gb`.

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
        device: torch.device = CPU,
        memory_gb: float = 0,
        device_gb: float = 0,
    ):
        self.dataset, self.label_px, self.device = dataset, label_px, device
        self.view_seed, self.query_labels, self.void_is_background = view_seed, query_labels, void_is_background
        sources = (late,) if query is None else (late, query)
        self.late, *others = feeds(sources, device, memory_gb, device_gb)
        self.query = others[0] if others else None
        self._masks: Kept[tuple[str, int, int]] = Kept(int(MASKS_GB * GB), device if device_gb else CPU)

    def hit_share(self) -> float:
        """Share of the samples asked for so far that did not have to be read."""
        hits = [feed.hits() for feed in (self.late, self.query) if feed is not None]
        return sum(found for _, found in hits) / max(1, sum(asked for asked, _ in hits))

    def load(self, episodes: Sequence[Episode]) -> EpisodeBatch:
        """The episodes as one batch; all have the same number of shots."""
        ids = [[e.query, *e.supports] for e in episodes]
        flat_ids, flat_views = [i for row in ids for i in row], [v for e in episodes for v in e.views]
        flips = torch.tensor([e.flips for e in episodes])
        late = self.late.rows(flat_ids, flat_views).unflatten(0, flips.shape)
        query_input = None
        if self.query is not None:
            queries = self.query.rows([e.query for e in episodes], [e.views[0] for e in episodes])
            query_input = _mirror(queries, flips[:, 0])
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
    ) -> Iterator[EpisodeBatch]:
        """Batches of the episodes of these indices, drawn and read by `threads`, up to `depth` batches ahead."""
        return ahead(lambda indices: self.load([sampler.episode(i) for i in indices]), batches, threads, depth)

    def _for_loss(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(labels == paper.VOID, 0) if self.void_is_background else labels

    def _masks_of(self, ids: list[list[str]], episodes: Sequence[Episode], first: int) -> Tensor:
        keys = [
            (i, v, e.class_id)
            for row, e in zip(ids, episodes, strict=True)
            for i, v in zip(row[first:], e.views[first:], strict=True)
        ]
        masks = self._masks.get(keys, self._drawn)
        return to_device(masks, self.device).unflatten(0, (len(ids), -1))

    def _drawn(self, keys: list[tuple[str, int, int]]) -> Tensor:
        return to_device(torch.from_numpy(np.array([self.mask(*key) for key in keys])), self._masks.device)

    def mask(self, image_id: str, view: int, class_id: int) -> np.ndarray:
        """A class's mask under a view, at the network's side."""
        drawn, whole = draw_view(self.view_seed, image_id, view), self.dataset.mask(image_id, class_id)
        mask = drawn.label(whole, self.label_px)
        if view in (PLAIN, PADDED) and not (mask == 1).any():
            _mark(mask, whole, drawn.extent(whole.shape))
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


def _mirror(x: Tensor, flips: Tensor) -> Tensor:
    """Left and right exchanged (last axis) where `flips` is true; `flips` has the leading axes of `x`."""
    if flips.any():
        chosen = flips.nonzero(as_tuple=True)  # places, as a mask would make a GPU count first
        x[chosen] = x[chosen].flip(-1)
    return x
