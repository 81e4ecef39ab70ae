"""Folders of this machine or of a shared file system, through the operating system."""

import errno
import mmap
import os
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from feature_store.errors import StoreError, StoreFault
from feature_store.storage.base import Bytes, Folder

FILES_KEPT = MAPS_KEPT = 256


class LocalFolder(Folder):
    """A folder; files that are read by range stay open, up to 256 of them."""

    remote = False
    threads = 4

    def __init__(self, url: str, path: str):
        self.url, self.path = url, path
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, key: str) -> Bytes:
        """See Folder."""
        with place(self.url, key), open(os.path.join(self.path, key), "rb") as file:
            return file.read()

    def span(self, key: str, start: int, length: int) -> Bytes:
        """See Folder."""
        with place(self.url, key), open(os.path.join(self.path, key), "rb", buffering=0) as file:
            begin = start if start >= 0 else max(os.fstat(file.fileno()).st_size + start, 0)
            return os.pread(file.fileno(), length, begin)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """See Folder. One call of the system, straight into the buffers."""
        with place(self.url, key):
            file = self._files.get(key)
            if file is not None:
                return os.preadv(file, buffers, start)
            file = os.open(os.path.join(self.path, key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.preadv(file, buffers, start)
            finally:
                if len(self._files) < FILES_KEPT and self._files.setdefault(key, file) == file:
                    weakref.finalize(self, os.close, file)
                else:
                    os.close(file)

    def map(self, key: str) -> memoryview:
        """See Folder. A map lives on while a view of it does, even if it is forgotten here."""
        mapped = self._maps.get(key)
        if mapped is None:
            with place(self.url, key), open(os.path.join(self.path, key), "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) < MAPS_KEPT:
                self._maps[key] = mapped
        return memoryview(mapped)

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See Folder. A killed write leaves a `.partial` file, which `gc` removes."""
        target = os.path.join(self.path, key)
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with place(self.url, key):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                self._write(partial, parts)
                os.replace(partial, target)
            except BaseException:
                _remove(partial)
                raise

    def create(self, key: str, data: bytes) -> bool:
        """See Folder."""
        target = os.path.join(self.path, key)
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with place(self.url, key):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                self._write(partial, [data])
                os.link(partial, target)  # fails if the target is there, unlike a rename
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if os.path.exists(target):  # a file system without hard links: exclusive but for a race
                    return False
                os.replace(partial, target)
            finally:
                _remove(partial)
        return True

    def delete(self, key: str) -> None:
        """See Folder."""
        with place(self.url, key):
            _remove(os.path.join(self.path, key))

    def names(self, folder: str) -> list[str]:
        """See Folder."""
        try:
            with place(self.url, folder):
                return sorted(e.name for e in os.scandir(os.path.join(self.path, folder)) if not e.is_dir())
        except FileNotFoundError:
            return []

    @staticmethod
    def _write(path: str, parts: Sequence[Bytes]) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            left = [memoryview(part) for part in parts if len(part)]
            while left:
                # At once, as the page cache then holds the file in large pages, which are read a tenth faster.
                written = os.writev(file, left[:1024])
                while left and written >= len(left[0]):
                    written -= len(left.pop(0))
                if written:
                    left[0] = left[0][written:]
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def place(url: str, key: str) -> Iterator[None]:
    """Errors of the operating system as errors of the store; a missing file stays what it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFault(f"{url}/{key}: no space left there; free some and rerun to resume") from None
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOTDIR):
            raise StoreError(f"{url}/{key}: {error.strerror}; check its permissions") from None
        raise StoreFault(f"{url}/{key}: {error}; fix this and rerun to resume") from None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
