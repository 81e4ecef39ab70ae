"""The contract of a back end: whole reads, ranges, atomic writes, exclusive creation, listing, deletion.

A back end writes the six abstract methods and overrides what it can do better than the defaults.
"""

import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from feature_store.errors import StoreError, StoreFault
from fsdino.errors import first_line

T = TypeVar("T")
Bytes = bytes | memoryview
PATIENCE_SECONDS = 180.0  # after which no further try is made
TRIES = 6
BACKOFF_SECONDS = 0.2  # doubled at each try, and drawn at random up to that
LONGEST_BACKOFF_SECONDS = 10.0


class Throttled(OSError):
    """The store answers, and asks for fewer requests: there is no bound to the tries, only to the time."""


class Folder(ABC):
    """The files of one store. Missing files raise FileNotFoundError, a place that fails StoreFault."""

    url: str
    remote: bool = True
    """Whether bytes travel over a wire: worth a local cache, and a second request if a checksum is wrong."""
    threads: int = 16
    """Requests that are worth making at once."""

    @abstractmethod
    def read(self, key: str) -> Bytes:
        """A whole file."""

    @abstractmethod
    def span(self, key: str, start: int, length: int) -> Bytes:
        """`length` bytes from `start`, or from the end if it is negative; fewer where the file ends."""

    @abstractmethod
    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """Write a file so that a reader sees all of it or nothing, whatever is killed."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a file unless it is there, then false. Atomic locally and on S3."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Base names of the files in a folder, sorted; none if it is not there."""

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers, one after another, with the bytes from `start`. Returns how many there were."""
        data = memoryview(self.span(key, start, sum(len(buffer) for buffer in buffers)))
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            # NumPy, as it lets other threads run meanwhile.
            np.copyto(np.frombuffer(buffer, np.uint8)[: len(part)], np.frombuffer(part, np.uint8))
            at += len(part)
        return at

    def map(self, key: str) -> memoryview:
        """A file's bytes without a copy, where the back end can map it. Raises StoreError where it cannot."""
        raise StoreError(f"{self.url}/{key}: only local stores can be mapped; use read()")


def patiently(place: str, request: Callable[[], T]) -> T:
    """The request, up to six times and three minutes, with backoff and jitter; a missing file is an answer. A store
    that is asked too much is tried for the three minutes."""
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError as error:
            last = attempt >= TRIES - 1 and not isinstance(error, Throttled)
            if last or time.monotonic() - started > PATIENCE_SECONDS:
                raise StoreFault(
                    f"{place}: the object store failed {attempt + 1} times, at last with: {first_line(error)}; "
                    "fix this and rerun to resume"
                ) from None
            time.sleep(random.uniform(0, min(BACKOFF_SECONDS * 2**attempt, LONGEST_BACKOFF_SECONDS)))
    raise AssertionError("unreachable")
