"""Members of tar archives read in place, by fsspec's URLs: `tar://NAME::ARCHIVE`, of a local or any remote archive."""

import os
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

    Raises UserError if it is no tar or is truncated, FileNotFoundError if it is not there.
    """
    with _lock:
        known = _indexes.get(archive)
    if known is None:
        with _opened(archive) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            known = _index(archive, file, end)
        with _lock:
            _indexes[archive] = known
    return known


def read_member(url: str) -> bytes:
    """A member's bytes. Raises FileNotFoundError if the archive has no such member."""
    name, archive = url.removeprefix("tar://").split("::", 1)
    member = members(archive).get(name)
    if member is None:
        raise FileNotFoundError(f"{archive} has no member {name}")
    with _opened(archive) as file:
        file.seek(member.offset)
        return file.read(member.size)


def is_member(source: object) -> bool:
    """Whether a source is a member of a tar."""
    return isinstance(source, str) and source.startswith("tar://") and "::" in source


_indexes: dict[str, dict[str, Member]] = {}
_lock = threading.Lock()


def _opened(archive: str) -> Any:
    """A file that can be read and sought."""
    return fsspec.open(archive, "rb").open() if "://" in archive else open(archive, "rb")


def _index(archive: str, file: Any, end: int) -> dict[str, Member]:
    found: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isfile():
                    found[entry.name.removeprefix("./")] = Member(entry.offset_data, entry.size)
    except tarfile.ReadError as error:
        if not found:
            raise UserError(f"{archive}: expected a tar archive, got: {error}; download it again") from None
    if not found:
        raise UserError(f"{archive}: expected a tar archive with files, found none; download it again")
    last, member = max(found.items(), key=lambda entry: entry[1].offset)
    if member.offset + member.size > end:
        raise UserError(
            f"{archive}: truncated at {end} bytes within {last}, its member {len(found)}; download it again"
        )
    return found
