"""Memory for results, reused once nobody refers to what was in it.

Fresh memory costs a page fault for every 4 KB, which for batches of features takes longer than reading them.
"""

import math
import threading
import weakref
from collections import deque

import numpy as np

SMALLEST_BYTES = 8 << 20  # below this the allocator does the same
KEPT_BYTES = 1 << 30


class Buffers:
    """Hands out arrays. An array's memory comes back when it and all views of it are gone; at most 1 GB waits."""

    def __init__(self) -> None:
        self._waiting: deque[np.ndarray] = deque()
        self._lock = threading.RLock()  # a finaliser may run in the middle of `empty`

    def empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """As np.empty."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        block = self._block(size)
        # Views refer to this array, not to the block, whose owner is hidden from them by the memoryview.
        array = np.frombuffer(memoryview(block.data), dtype)
        weakref.finalize(array, self._take_back, block).atexit = False
        return array.reshape(shape)

    def _block(self, size: int) -> np.ndarray:
        with self._lock:
            for position, block in enumerate(self._waiting):
                if block.nbytes == size:
                    del self._waiting[position]
                    return block
        return np.empty(size, np.uint8)

    def _take_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._waiting.append(block)
            while sum(waiting.nbytes for waiting in self._waiting) > KEPT_BYTES:
                self._waiting.popleft()
