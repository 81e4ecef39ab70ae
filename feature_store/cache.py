"""A bounded cache on a local disk in front of a remote store, shared by any number of processes.

It keeps single samples as the store has them, crc32c included: random access would pull whole shards of 32 for each
sample (docs/benchmarks has both measured). Once full it takes in nothing more: under random access over whole epochs a
fixed part of the samples is hit more often than the most recent ones, and nothing is written in vain. Samples of
stores that nobody has open make room first.
"""

import fcntl
import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from feature_store.files import Bytes
from feature_store.layout import CRC_BYTES


@dataclass(frozen=True)
class CacheSettings:
    """Where the cache is, and how large it may grow."""

    folder: str
    limit_bytes: int


class SampleCache:
    """The cached samples of one store. A store that was made anew has a new `seal`, so old samples never return."""

    def __init__(self, settings: CacheSettings, url: str, seal: bytes):
        self.settings = settings
        self.root = Path(settings.folder)
        self.folder = self.root / hashlib.sha256(url.encode() + b"\0" + bytes(seal)).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)  # the order in which unused stores make room
        # Locks that the kernel takes back whatever happens to this process.
        locks = [os.open(f / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for f in (self.root, self.folder)]
        self.close = weakref.finalize(self, _close, locks)
        """Let the samples make room for those of other stores; done, too, when nothing refers to this any more."""
        with self._total() as total:
            if _lock(locks[0], fcntl.LOCK_EX):  # nobody else is writing: count what is there, kills included
                total.write(_size(self.root))
            for file in locks:
                fcntl.flock(file, fcntl.LOCK_SH)

    def read_into(self, row: int, sample: memoryview) -> bytes | None:
        """Fill `sample` from the cache and return its stored crc32c; None if it is not there or not whole."""
        try:
            file = os.open(self.folder / str(row), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        crc = bytearray(CRC_BYTES)
        try:
            whole = os.preadv(file, [sample, crc], 0) == len(sample) + CRC_BYTES
        finally:
            os.close(file)
        return bytes(crc) if whole else None

    def has(self, row: int) -> bool:
        """Whether the sample is there."""
        return (self.folder / str(row)).exists()

    def put(self, row: int, chunk: Bytes) -> bool:
        """Keep a sample with its crc32c, if there is room or room can be made."""
        with self._total() as total:
            used = total.read()
            if used + len(chunk) > self.settings.limit_bytes:
                used = self._make_room(used, len(chunk))
                if used + len(chunk) > self.settings.limit_bytes:
                    total.write(used)
                    return False
            total.write(used + len(chunk))  # before the file: a kill in between leaves the count too high, not too low
        partial = self.folder / f"{row}.{uuid.uuid4().hex}.partial"
        try:
            partial.write_bytes(chunk)
            os.replace(partial, self.folder / str(row))
        except OSError:  # a full disk: the cache is a convenience, the sample is in hand
            partial.unlink(missing_ok=True)
            return False
        return True

    def drop(self, row: int) -> None:
        """Forget a damaged sample."""
        (self.folder / str(row)).unlink(missing_ok=True)

    def _make_room(self, used: int, wanted: int) -> int:
        """Remove stores that nobody has open, the longest unused first, until there is room. Bytes in use then."""
        others = [f for f in self.root.iterdir() if f.is_dir() and f != self.folder]
        for folder in sorted(others, key=lambda f: f.stat().st_mtime):
            if used + wanted <= self.settings.limit_bytes:
                break
            if _unused(folder):
                freed = _size(folder)
                shutil.rmtree(folder, ignore_errors=True)
                used -= freed
        return used

    @contextmanager
    def _total(self) -> Iterator["_Total"]:
        """The count of bytes in the whole cache, for this process alone."""
        file = os.open(self.root / "bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _Total(file)
        finally:
            os.close(file)


class _Total:
    def __init__(self, file: int):
        self.file = file

    def read(self) -> int:
        return int.from_bytes(os.pread(self.file, 8, 0), "little")

    def write(self, value: int) -> None:
        os.pwrite(self.file, max(value, 0).to_bytes(8, "little"), 0)


def _close(locks: list[int]) -> None:
    for file in locks:
        os.close(file)


def _unused(folder: Path) -> bool:
    """Whether no process has the store open."""
    try:
        file = os.open(folder / "in-use", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _lock(file, fcntl.LOCK_EX)
    finally:
        os.close(file)


def _lock(file: int, kind: int) -> bool:
    """Take a lock unless another has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _size(folder: Path) -> int:
    """Bytes of the samples below a folder."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            if name not in ("in-use", "bytes"):
                try:
                    total += os.stat(os.path.join(path, name)).st_size
                except FileNotFoundError:
                    continue
    return total
