"""Places: paths of this machine and fsspec URLs, made absolute, and redacted before they are written down."""

import os
import re
from typing import Any

from feature_store.errors import StoreError


def is_url(place: str) -> bool:
    """Whether a place is a URL (or a chain of them) rather than a path, which may hold any number of colons."""
    return not place.startswith("/") and ("://" in place or "::" in place)


def absolute(url: str) -> str:
    """The URL, or the absolute form of a local path, so that every process means the same place.

    Raises StoreError if the URL carries credentials: they would end up in logs, manifests and tracking.
    """
    if not is_url(url):
        return os.path.abspath(url)
    if url != redacted(url):
        raise StoreError(
            f"{redacted(url)}: expected a URL without credentials or a query; put credentials into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    return url


def redacted(place: str) -> str:
    """A place as it may be written down: without credentials, and without queries, which may hold a signature."""
    if not is_url(place):
        return place
    return "::".join(_plain(part) for part in place.split("::"))


def redacted_text(text: str) -> str:
    """A text without the credentials and queries of URLs in it."""
    text = re.sub(r"([A-Za-z][\w+.-]*://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\",;)]*", r"\1", text)


def local_path(url: str) -> str | None:
    """The path of a local place, None for a remote one."""
    if not is_url(url):
        return url
    return url.removeprefix("file://") if url.startswith("file://") else None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and path of a URL. Raises StoreError if the scheme is unknown or lacks its driver."""
    import fsspec

    try:
        return fsspec.url_to_fs(absolute(url))
    except (ValueError, ImportError) as error:
        raise StoreError(f"{redacted(url)}: expected a path or an fsspec URL, got: {error}") from None


def _plain(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
