"""Features as tensors on a device: from a store through tiers of memory, each of which keeps what fits."""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from feature_store import FeatureStore, packing

K = TypeVar("K", bound=Hashable)
CPU = torch.device("cpu")
GB = 10**9


class Features(Protocol):
    """Where features are read: a store, or an encoder at work (live.py)."""

    def rows(self, sample_ids: Sequence[str], views: Sequence[int]) -> np.ndarray:
        """Features (n, g, g, c) of images under their views."""
        ...


class Kept(Generic[K]):
    """Tensors of one shape and type by key: the first that fit into `limit_bytes` of a device's memory.

    Once full it takes in nothing more, as the cache on disk: under random access a fixed part is hit as often as the
    most recent ones, and nothing is copied in vain.
    """

    def __init__(self, limit_bytes: int, device: torch.device = CPU):
        self.limit_bytes, self.device = limit_bytes, device
        self.asked, self.found = 0, 0
        """Keys so far, each once in a request, and those of them that were here."""
        self._slots: dict[K, int] = {}
        self._memory = torch.empty(0)
        self._lock = threading.Lock()

    def get(self, keys: Sequence[K], read: Callable[[list[K]], Tensor]) -> Tensor:
        """A new tensor (keys, ...); `read` brings, on the device, those of keys that are not here, each once."""
        wanted = dict.fromkeys(keys)
        missing = {key: at for at, key in enumerate(k for k in wanted if k not in self._slots)}
        self.asked, self.found = self.asked + len(wanted), self.found + len(wanted) - len(missing)
        if not missing:
            return self._memory.index_select(0, self._places(self._slots[key] for key in keys))
        fresh = read(list(missing))
        self._take_in(missing, fresh)
        if len(missing) == len(keys):
            return fresh
        if len(missing) == len(wanted):
            return fresh.index_select(0, self._places(missing[key] for key in keys))
        found = fresh.new_empty((len(keys), *fresh.shape[1:]))
        for memory, slots in ((fresh, missing), (self._memory, self._slots)):
            at = [position for position, key in enumerate(keys) if (key in missing) == (slots is missing)]
            chosen = memory.index_select(0, self._places(slots[keys[position]] for position in at))
            found.index_copy_(0, self._places(at), chosen)
        return found

    def _take_in(self, missing: dict[K, int], fresh: Tensor) -> None:
        with self._lock:
            if not self._slots:
                each = fresh[0].numel() * fresh.element_size()
                self._memory = fresh.new_empty((self.limit_bytes // each, *fresh.shape[1:]))
            free = range(len(self._slots), len(self._memory))
            chosen = dict(zip((key for key in missing if key not in self._slots), free, strict=False))
            if chosen:
                first = next(iter(chosen.values()))
                taken = fresh[self._places(missing[key] for key in chosen)]
                self._memory[first : first + len(chosen)] = taken
                self._slots |= chosen

    def _places(self, positions: Iterable[int]) -> Tensor:
        return to_device(torch.tensor(list(positions)), self.device)


class Feed:
    """A source's features on a device. What fits is kept there, else in memory, in the form in which it is stored."""

    def __init__(self, source: Features, device: torch.device = CPU, memory_bytes: int = 0, device_bytes: int = 0):
        self.source, self.device = source, device
        self._store = source if isinstance(source, FeatureStore) else None
        self._memory: Kept[tuple[str, int]] = Kept(memory_bytes)
        self._on_device: Kept[tuple[str, int]] = Kept(device_bytes, device)

    def rows(self, sample_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Features (n, c, g, g) of images under their views, channels last in memory; the caller may write in them."""
        keys = list(zip(sample_ids, views, strict=True))
        found = self._on_device.get(keys, self._moved)
        if self._store is not None and found.dtype == torch.int8:
            found = unpacked(found, self._store.fingerprint.channels)
        return found.movedim(-1, 1)

    def hits(self) -> tuple[int, int]:
        """Samples asked for so far, and those of them that were in this process's memory or on its device."""
        return self._on_device.asked, self._on_device.found + self._memory.found

    def _moved(self, keys: list[tuple[str, int]]) -> Tensor:
        return to_device(self._memory.get(keys, self._read), self.device)

    def _read(self, keys: list[tuple[str, int]]) -> Tensor:
        ids, views = [key[0] for key in keys], [key[1] for key in keys]
        if self._store is None:
            return torch.from_numpy(self.source.rows(ids, views))
        return torch.from_numpy(self._store.rows(ids, views, packed=True))


def feeds(
    sources: Sequence[Features], device: torch.device = CPU, memory_gb: float = 0, device_gb: float = 0
) -> list[Feed]:
    """A feed for each source; they share the memory by the size of their samples."""
    stores = [source if isinstance(source, FeatureStore) else None for source in sources]
    total = max(1, sum(store.sample_bytes for store in stores if store))

    def room(store: FeatureStore | None, gb: float) -> int:
        return int(min(store.sample_bytes / total * gb * GB, len(store) * store.sample_bytes)) if store else 0

    return [
        Feed(source, device, room(store, memory_gb), room(store, device_gb))
        for source, store in zip(sources, stores, strict=True)
    ]


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU copies it while the host goes on."""
    if host.device.type == device.type:
        return host
    return host.pin_memory().to(device, non_blocking=True)


def unpacked(stored: Tensor, channels: int) -> Tensor:
    """What `feature_store.packing.unpack` makes of codes and scales (..., stored channels), on their device: features
    (..., channels) float32."""
    scales = stored[..., channels:].contiguous().view(torch.float16).float()
    features = stored[..., :channels].float()
    whole = channels // packing.GROUP
    split = whole * packing.GROUP
    features[..., :split].unflatten(-1, (whole, packing.GROUP)).mul_(scales[..., :whole, None])
    features[..., split:] *= scales[..., whole:]
    return features
