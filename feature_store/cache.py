"""A bounded cache on a local disk in front of a remote store, shared by any number of processes.

It keeps single samples: random access would pull whole shards of 32 for each sample (docs/benchmarks has both
measured). Once full it takes in nothing more: under random access over whole epochs a
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

from feature_store.errors import StoreError
from feature_store.storage import Bytes

SUFFIX = ".samples"


@dataclass(frozen=True)
class CacheSettings:
    """Where the cache is, and how large it may grow."""

    folder: str
    limit_bytes: int


class SampleCache:
    """The cached samples of one store. A store that was written again has a new `seal`, so old samples never return.

    Nothing in the folder is touched but what bears the cache's own names. Raises StoreError if it cannot be written;
    later faults of the disk only make the cache idle.
    """

    def __init__(self, settings: CacheSettings, url: str, seal: bytes):
        self.settings = settings
        self.root = Path(settings.folder)
        name = hashlib.sha256(url.encode() + b"\0" + bytes(seal)).hexdigest()[:24]
        self.folder = self.root / f"{name}{SUFFIX}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._total() as total:  # so that no other process makes room here meanwhile
                self.folder.mkdir(exist_ok=True)
                os.utime(self.folder)  # the order in which unused stores make room
                # Locks that the kernel takes back whatever happens to this process.
                places = (self.root / "users.fsdino", self.folder / "in-use")
                locks = [os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) for place in places]
                self.close = weakref.finalize(self, _close, locks)
                """Let the samples make room for those of others; done, too, when nothing refers to this any more."""
                if _lock(locks[0], fcntl.LOCK_EX):  # nobody else is writing: count what is there, kills included
                    total.write(sum(_size(folder) for folder in self._folders()))
                for file in locks:
                    fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            raise StoreError(
                f"{settings.folder}: cannot hold a cache ({error.strerror}); name another folder"
            ) from None

    def read_into(self, row: int, sample: memoryview) -> bool:
        """Fill `sample` from the cache; false if it is not there or not whole."""
        try:
            file = os.open(self.folder / str(row), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.preadv(file, [sample, bytearray(1)], 0) == len(sample)
        except OSError:
            return False
        finally:
            os.close(file)

    def has(self, row: int) -> bool:
        """Whether the sample is there."""
        return (self.folder / str(row)).exists()

    def put(self, row: int, sample: Bytes) -> bool:
        """Keep a sample, if there is room or room can be made."""
        try:
            return self._put(row, sample)
        except OSError:  # a full or failing disk: the cache is a convenience, the sample is in hand
            return False

    def _put(self, row: int, sample: Bytes) -> bool:
        if self.has(row):
            return True
        with self._total() as total:
            used = total.read()
            if used + len(sample) > self.settings.limit_bytes:
                used = self._make_room(used, len(sample))
                if used + len(sample) > self.settings.limit_bytes:
                    total.write(used)
                    return False
            total.write(used + len(sample))  # before the file: a kill in between leaves the count too high, not too low
        partial = self.folder / f"{row}.{uuid.uuid4().hex}.partial"
        try:
            partial.write_bytes(sample)
            os.link(partial, self.folder / str(row))
            return True
        except OSError as error:
            self._give_back(len(sample))
            return isinstance(error, FileExistsError)  # another thread or process was quicker
        finally:
            partial.unlink(missing_ok=True)

    def drop(self, row: int) -> None:
        """Remove a damaged sample."""
        try:
            size = (self.folder / str(row)).stat().st_size
            (self.folder / str(row)).unlink()
            self._give_back(size)
        except OSError:
            return

    def _give_back(self, size: int) -> None:
        with self._total() as total:
            total.write(total.read() - size)

    def _make_room(self, used: int, wanted: int) -> int:
        """Remove stores that nobody has open, the longest unused first, until there is room. Bytes in use then."""
        others = [folder for folder in self._folders() if folder != self.folder]
        for folder in sorted(others, key=lambda f: f.stat().st_mtime):
            if used + wanted <= self.settings.limit_bytes:
                break
            if _unused(folder):
                freed = _size(folder)
                shutil.rmtree(folder, ignore_errors=True)
                used -= freed
        return used

    def _folders(self) -> list[Path]:
        """The folders of cached stores, this one's among them; whatever else lies there is none of ours."""
        return [folder for folder in self.root.glob(f"{'[0-9a-f]' * 24}{SUFFIX}") if folder.is_dir()]

    @contextmanager
    def _total(self) -> Iterator["_Total"]:
        """The count of bytes in the whole cache, for this process alone."""
        file = os.open(self.root / "bytes.fsdino", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
    """Bytes of the samples of one store."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name != "in-use":
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:
                    continue
    return total
