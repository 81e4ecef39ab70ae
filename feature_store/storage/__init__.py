"""Where stores lie: one contract (`base.Folder`), one back end a file."""

from urllib.parse import urlsplit

from feature_store.storage.base import Bytes, Folder
from feature_store.urls import absolute, local_path

__all__ = ["Bytes", "Folder", "open_folder"]


def open_folder(url: str) -> Folder:
    """The files below a URL: a path goes through the operating system, s3:// and http(s):// through obstore, every
    other scheme through fsspec. Raises StoreError if the scheme is unknown or its driver is not installed."""
    url = absolute(url)
    path = local_path(url)
    if path is not None:
        from feature_store.storage.local import LocalFolder

        return LocalFolder(url, path)
    if urlsplit(url).scheme in ("s3", "http", "https"):
        from feature_store.storage.object_store import ObjectFolder

        return ObjectFolder(url)
    from feature_store.storage.fsspec import FsspecFolder

    return FsspecFolder(url)
