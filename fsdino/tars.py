"""Members of tar archives read in place, by fsspec's URLs: `tar://NAME::ARCHIVE`, of a local or any remote archive."""

import tarfile
import threading
from typing import Any, NamedTuple

import fsspec

from fsdino.errors import UserError


class Member(NamedTuple):
    """Where a member's bytes are in its archive."""

    offset: int
    size: int


def members(archive: str) -> dict[str, Member]:
    """Files of an archive by their names, without a leading `./`. Headers alone are read, once in a process.

    Raises UserError if it is no tar, or is truncated or damaged, FileNotFoundError if it is not there.
    """
    with _lock:
        if archive not in _indexes:
            with _opened(archive) as file:
                _indexes[archive] = _index(archive, file)
        return _indexes[archive]


def read_member(url: str) -> bytes:
    """A member's bytes. Raises FileNotFoundError if the archive has no such member."""
    name, archive = url.removeprefix("tar://").split("::", 1)
    member = members(archive).get(name)
    if member is None:
        raise FileNotFoundError(f"{archive} has no member {name}")
    if "://" in archive:
        fs, path = fsspec.url_to_fs(archive)
        return fs.cat_file(path, start=member.offset, end=member.offset + member.size)
    with open(archive, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def is_member(source: object) -> bool:
    """Whether a source is a member of a tar."""
    return isinstance(source, str) and source.startswith("tar://") and "::" in source


_indexes: dict[str, dict[str, Member]] = {}
_lock = threading.Lock()


def _opened(archive: str) -> Any:
    """A file that can be read and sought; of a remote one no more is fetched than is read."""
    if "://" not in archive:
        return open(archive, "rb")
    fs, path = fsspec.url_to_fs(archive)
    return fs.open(path, "rb", cache_type="none")


def _index(archive: str, file: Any) -> dict[str, Member]:
    found: dict[str, Member] = {}
    last, end = "its beginning", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                last, end = entry.name, tar.offset
                if entry.isfile():
                    found[entry.name.removeprefix("./")] = Member(entry.offset_data, entry.size)
            end = tar.offset
    except tarfile.ReadError as error:
        if not found:
            raise UserError(f"{archive}: expected a tar archive, got: {error}; download it again") from None
    if not found:
        raise UserError(f"{archive}: expected a tar archive with files, found none; download it again")
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what ends every archive
        raise UserError(f"{archive}: truncated or damaged behind {last}, its file {len(found)}; download it again")
    return found
