"""Memory for results that is used again once nobody refers to what was in it.

Fresh memory costs a page fault for every 4 KB, which for batches of features takes longer than reading them.
"""

import math
import weakref
from collections import OrderedDict, deque

import numpy as np

SMALLEST_BYTES = 8 << 20  # below this the allocator does the same
KEPT_BYTES = 1 << 30


class Buffers:
    """Hands out arrays. An array's memory comes back when it and all views of it are gone; at most 1 GB waits."""

    def __init__(self) -> None:
        self._free: OrderedDict[int, deque[np.ndarray]] = OrderedDict()
        self._waiting = 0

    def empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """As np.empty."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        try:
            block = self._free[size].pop()
            self._waiting -= size
        except (KeyError, IndexError):
            block = np.empty(size, np.uint8)
        # Views refer to this array, not to the block, whose owner is hidden from them by the memoryview.
        array = np.frombuffer(memoryview(block.data), dtype)
        weakref.finalize(array, self._take_back, block).atexit = False
        return array.reshape(shape)

    def _take_back(self, block: np.ndarray) -> None:
        size = block.nbytes
        self._free.setdefault(size, deque()).append(block)
        self._free.move_to_end(size)
        self._waiting += size
        while self._waiting > KEPT_BYTES:
            oldest = next(iter(self._free))
            if self._free[oldest]:
                self._free[oldest].pop()
                self._waiting -= oldest
            else:
                del self._free[oldest]
