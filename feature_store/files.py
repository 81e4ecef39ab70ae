"""Whole small files on any fsspec URL: read, atomic write, list."""

import os
import uuid
from urllib.parse import urlsplit

import fsspec


def absolute(url: str) -> str:
    """The URL, or the absolute form of a local path, so that every process means the same place."""
    return url if urlsplit(url).scheme else os.path.abspath(url)


def local_path(url: str) -> str | None:
    """The path of a local store, None for a remote one."""
    if not urlsplit(url).scheme:
        return url
    return url.removeprefix("file://") if url.startswith("file://") else None


def read_bytes(url: str, key: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    fs, root = fsspec.url_to_fs(url)
    return fs.cat_file(f"{root}/{key}")


def exists(url: str, key: str) -> bool:
    """Whether the file is there."""
    fs, root = fsspec.url_to_fs(url)
    return fs.exists(f"{root}/{key}")


def write_bytes(url: str, key: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing: rename locally, one PUT on object stores."""
    local = local_path(url)
    if local is None:
        fs, root = fsspec.url_to_fs(url)
        fs.pipe_file(f"{root}/{key}", data)
        return
    target = os.path.join(local, key)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{uuid.uuid4().hex}.partial"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


def names(url: str, folder: str) -> list[str]:
    """Base names of the files in a folder, sorted; none if it is not there."""
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    try:
        return sorted(path.rsplit("/", 1)[1] for path in fs.ls(f"{root}/{folder}", detail=False))
    except FileNotFoundError:
        return []
