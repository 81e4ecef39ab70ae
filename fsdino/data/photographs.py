"""Photographs without labels: a folder, a glob, or either on any fsspec URL."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from pathlib import Path

import fsspec
from fsspec.utils import glob_translate

from fsdino.errors import UserError, reachable
from fsdino.preprocess import SUFFIXES
from fsdino.tars import is_member, members

TAR = ".tar"
LISTED = SUFFIXES | {TAR}


def list_photographs(
    place: str, share: float = 1.0, seed: int = 0, skipped: dict[str, str] | None = None, flag: str = "--images"
) -> dict[str, str]:
    """Photographs by their path below the folder (or below a glob's fixed part), sorted; values are paths or URLs.

    Tar archives in the place are looked into: SA-1B's need no unpacking. Symbolic links are followed, each folder once.
    Of a `share` below 1 it is always the same photographs for a seed, drawn by their file names, whether they are
    unpacked or not. Raises UserError if there is none, or part of it cannot be listed; an archive that is damaged goes
    into `skipped` instead, if that is given.
    """
    try:
        with reachable(f"{flag} {place}"):
            found = dict(sorted(_within_tars(_remote(place) if _is_url(place) else _local(place), skipped)))
    except FileNotFoundError:
        found = {}
    if not found and skipped:
        raise UserError(
            f"{flag} {place}: expected photographs, found none but damaged archives: {next(iter(skipped.values()))}"
        )
    if share < 1 and found:
        found = _drawn(found, share, seed)
    if not found:
        raise UserError(
            f"{flag} {place}: expected photographs, found none; name a folder with any of "
            f"{' '.join(sorted(SUFFIXES))}, or a glob such as 'photos/**/*.jpg' in quotes"
        )
    return found


def _within_tars(listed: Iterator[tuple[str, str]], skipped: dict[str, str] | None) -> Iterator[tuple[str, str]]:
    """What was listed, archives replaced by the photographs in them."""
    for image_id, source in listed:
        if Path(image_id).suffix.lower() != TAR:
            yield image_id, source
            continue
        try:
            names = members(source)
        except UserError as error:
            if skipped is None:
                raise
            skipped[source] = error.args[0]
            continue
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                yield f"{image_id[: -len(TAR)]}/{name}", f"tar://{name}::{source}"


def _drawn(found: dict[str, str], share: float, seed: int) -> dict[str, str]:
    """A share of the photographs: those whose names, with the seed, have the lowest digests."""

    def key(image_id: str) -> tuple[bytes, str]:
        return hashlib.sha256(
            f"{seed} {image_id.rsplit('/', 1)[-1]}".encode(errors="surrogateescape")
        ).digest(), image_id

    chosen = set(sorted(found, key=key)[: max(1, round(share * len(found)))])
    return {image_id: source for image_id, source in found.items() if image_id in chosen}


def file_stamps(sources: Sequence[str]) -> dict[str, str]:
    """What changes when a photograph does: its bytes, then modification time or ETag; empty where it cannot be told.

    Remote places are listed a folder at a time, as a request for each photograph would take longer than reading them.
    """
    remote = [source for source in sources if _is_url(source) and not is_member(source)]
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(sources, pool.map(_local_stamp, sources), strict=True))
    by_folder: dict[tuple[str, str], list[str]] = {}
    for source in remote:
        archive = f"::{source.split('::', 1)[1]}" if "::" in source else ""
        by_folder.setdefault((source.split("::")[0].rsplit("/", 1)[0], archive), []).append(source)
    for (folder, archive), inside in by_folder.items():
        found |= _remote_stamps(f"{folder}/{archive}", inside)
    return found


def same_file(stamp: str, other: str, moved: bool = False) -> bool:
    """Whether two stamps are of one file, as far as they tell. Copies have other times, so of `moved` ones only the
    sizes count."""
    if not stamp or not other:
        return True
    return stamp == other or (moved and stamp.split(" ", 1)[0] == other.split(" ", 1)[0])


def _local_stamp(source: str) -> str:
    if is_member(source):
        return str(members(source.split("::", 1)[1])[source.removeprefix("tar://").split("::")[0]].size)
    if _is_url(source):
        return ""
    try:
        stat = os.stat(source)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _remote_stamps(folder: str, sources: Sequence[str]) -> dict[str, str]:
    try:
        fs, path = fsspec.url_to_fs(folder)
        entries = {entry["name"].rsplit("/", 1)[-1]: entry for entry in fs.ls(path.rstrip("/"), detail=True)}
    except Exception:  # reading them will tell
        return {}
    stamps = {}
    for source in sources:
        entry = entries.get(source.split("::")[0].rsplit("/", 1)[-1], {})
        version = next((entry[key] for key in ("ETag", "etag", "mtime", "LastModified", "CRC") if entry.get(key)), "")
        stamps[source] = f"{entry['size']} {version}".strip() if entry.get("size") is not None else ""
    return stamps


def set_name(place: str, share: float = 1.0, seed: int = 0) -> str:
    """What a set of photographs is called: its folder's name and a digest of the whole place and of the share.

    Folders of one name in different places often hold files of the same names, and are different sets all the same.
    """
    fixed = place.split("::")[-1] if _is_url(place) and "::" in place else _fixed_part(place)
    name = re.sub(r"[^\w.-]+", "-", fixed.rstrip("/").rsplit("/", 1)[-1]) or "images"
    whole = place if _is_url(place) else os.path.abspath(place)
    if share < 1:
        whole += f" {share} {seed}"
    return f"{name}-{hashlib.sha256(whole.encode(errors='surrogateescape')).hexdigest()[:6]}"


def _is_url(place: str) -> bool:
    return not place.startswith("/") and "://" in place


def _fixed_part(pattern: str) -> str:
    """The folders before the first wildcard."""
    parts = pattern.split("/")
    magic = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
    return "/".join(parts[:magic])


def _local(place: str) -> Iterator[tuple[str, str]]:
    place = os.path.abspath(place)
    # A folder may well be called "[1]": only what does not exist is a pattern.
    pattern = None if os.path.exists(place) or not has_magic(place) else re.compile(glob_translate(place))
    base = place if pattern is None else _fixed_part(place) or "/"
    deepest = None if pattern is None or "**" in place else place.count("/") - base.rstrip("/").count("/")
    if os.path.isfile(base):
        yield os.path.basename(base), base
        return
    seen: set[str] = set()
    if not os.path.isdir(base):
        return
    for folder, inner, names in os.walk(base, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen or (deepest is not None and folder.count("/") - base.rstrip("/").count("/") >= deepest):
            inner.clear()
            continue
        if deepest is None:  # only then can links lead in circles
            seen.add(real)
        inner.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in names:
            path = os.path.join(folder, name)
            if pattern.match(path) if pattern else Path(name).suffix.lower() in LISTED:
                yield os.path.relpath(path, base), path


def _raise(error: OSError) -> None:
    raise error


def _remote(place: str) -> Iterator[tuple[str, str]]:
    fs, path = fsspec.url_to_fs(place)
    wild = has_magic(path)
    names = fs.glob(path) if wild else fs.find(path)
    base = _fixed_part(path) if wild else path
    archive = f"::{place.split('::', 1)[1]}" if "::" in place else ""
    protocol = place.split("://", 1)[0]
    for name in names:
        if (wild and fs.isfile(name)) or (not wild and Path(name).suffix.lower() in LISTED):
            url = f"{protocol}://{name}{archive}" if archive else fs.unstrip_protocol(name)
            yield name.removeprefix(base).lstrip("/") or name.rsplit("/", 1)[-1], url
