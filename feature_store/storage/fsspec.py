"""Folders on any scheme that fsspec knows and that no faster back end covers."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from feature_store.errors import StoreError
from feature_store.storage.base import Bytes, Folder, patiently
from feature_store.urls import filesystem

T = TypeVar("T")


class FsspecFolder(Folder):
    """A folder of an fsspec file system."""

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = filesystem(url)

    def read(self, key: str) -> Bytes:
        """See Folder."""
        return self._try(key, lambda: self._fs.cat_file(f"{self._root}/{key}"))

    def span(self, key: str, start: int, length: int) -> Bytes:
        """See Folder."""
        end = None if start < 0 else start + length
        return self._try(key, lambda: self._fs.cat_file(f"{self._root}/{key}", start=start, end=end))

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See Folder. As atomic as the driver's `pipe_file`."""
        self._try(key, lambda: self._fs.pipe_file(f"{self._root}/{key}", b"".join(parts)))

    def create(self, key: str, data: bytes) -> bool:
        """See Folder, but two processes that ask at the same moment may both hear yes."""
        self._fs.invalidate_cache()
        if self._try(key, lambda: self._fs.exists(f"{self._root}/{key}")):
            return False
        self.write(key, [data])
        return True

    def delete(self, key: str) -> None:
        """See Folder."""
        try:
            self._try(key, lambda: self._fs.rm_file(f"{self._root}/{key}"))
        except FileNotFoundError:
            return

    def names(self, folder: str) -> list[str]:
        """See Folder."""
        self._fs.invalidate_cache()
        try:
            listed = self._try(folder, lambda: self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=True))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[1] for entry in listed if entry["type"] == "file")

    def _try(self, key: str, request: Callable[[], T]) -> T:
        def translated() -> T:
            try:
                return request()
            except PermissionError as error:
                raise StoreError(f"{self.url}/{key}: {error}; check its permissions") from None

        return patiently(f"{self.url}/{key}", translated)
