"""What a setting may be, said in its type and checked before anything starts: ranges of numbers, kinds of places."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

from feature_store.urls import absolute, is_url, local_path, redacted
from fsdino.errors import UserError

S = TypeVar("S")
TRACKING_SCHEMES = (
    "http",
    "https",
    "postgresql",
    "postgresql+psycopg2",
    "mysql",
    "mysql+pymysql",
    "mssql",
    "databricks",
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `low` itself only if `closed`."""

    low: float
    high: float
    closed: bool = True

    def check(self, flag: str, value: float) -> float:
        """The value. Raises UserError if it is not in the range, or not a number."""
        if math.isnan(value) or not (self.low <= value <= self.high) or (value == self.low and not self.closed):
            low = f"{self.low:g} to" if self.closed else f"more than {self.low:g}, up to"
            raise UserError(f"{flag} {value}: expected {low} {self.high:g}")
        return value


@dataclass(frozen=True)
class Location:
    """A path or URL that is read, or also written; a path becomes absolute, as workers have folders of their own."""

    written: bool = False
    local: bool = False
    """Whether it must be a path of this machine."""
    hub: bool = False
    """Whether hf:ORGANISATION/NAME is one too."""

    def check(self, flag: str, value: str) -> str:
        """The absolute place. Raises UserError if its URL carries credentials, or if no folder could be made there."""
        if self.hub and value.startswith("hf:"):
            return value
        if not value or value[0] in "~$" or re.match(r"\w+:[/\\](?!/)", value):
            raise UserError(f"{flag} {value!r}: expected a path or a URL; your shell may not have filled it in")
        if value != redacted(value):
            raise UserError(
                f"{flag} {redacted(value)}: expected a URL without credentials or a query; put credentials into the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            )
        if self.local and is_url(value):
            raise UserError(f"{flag} {value}: expected a path of this machine, got a URL")
        if "\0" in value:
            raise UserError(f"{flag}: expected a path, got one with a null byte")
        place = absolute(value)
        path = local_path(place)
        if self.written and path is not None:
            check_writable(flag, path)
        return place


@dataclass(frozen=True)
class Tracking:
    """An MLflow address."""

    def check(self, flag: str, value: str) -> str:
        """The address, a SQLite file's absolute. Raises UserError for what can be none."""
        if not is_url(value):
            raise UserError(f"{flag} {value}: expected sqlite:///FILE or the http address of a server")
        if value.startswith("sqlite:///"):
            path = os.path.abspath(value.removeprefix("sqlite:///"))
            check_writable(flag, os.path.dirname(path))
            if os.path.isdir(path):
                raise UserError(f"{flag} {value}: expected a database file, got a folder")
            if {"?", "%"} & set(path):  # SQLAlchemy takes what follows for options, or for another letter
                raise UserError(f"{flag} {value}: expected a path without ? and %; name the file otherwise")
            return f"sqlite:///{path}"
        scheme = urlsplit(value).scheme
        if scheme not in TRACKING_SCHEMES or not urlsplit(value).netloc:
            raise UserError(f"{flag} {redacted(value)}: expected sqlite:///FILE or the http address of a server")
        if scheme in ("http", "https") and value != redacted(value):
            raise UserError(
                f"{flag} {redacted(value)}: expected an address without credentials; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        return value


@dataclass(frozen=True)
class NewFile:
    """A file of this machine, in a folder that exists."""

    suffix: str = ""
    """How its name ends."""

    def check(self, flag: str, value: str) -> str:
        """The path. Raises UserError if no such file can be written there."""
        path = Path(value).absolute()
        if not value.endswith(self.suffix) or path.is_dir() or not path.parent.is_dir():
            what = f"a {self.suffix} file" if self.suffix else "a file"
            raise UserError(f"{flag} {value}: expected {what} in a folder that exists")
        return value


def check_batch(batch: int, workers: int, accumulate: int = 1) -> None:
    """Raise UserError if a batch cannot be split evenly."""
    if batch % workers:
        raise UserError(f"--workers {workers}: expected a divisor of the batch {batch}")
    if batch % (workers * accumulate):
        raise UserError(
            f"--accumulate {accumulate}: expected a divisor of the {batch // workers} episodes that each worker gets"
        )


def check_writable(flag: str, path: str) -> None:
    """Raise UserError if a folder is not there and could not be made there, or if nothing may be written in it."""
    there = Path(path)
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        folder = there.is_dir()
    except OSError as error:
        raise UserError(f"{flag} {path}: expected a path, got: {error.strerror}") from None
    if not folder:
        raise UserError(f"{flag} {path}: expected a folder, but {there} is a file; choose another")
    if not os.access(there, os.W_OK | os.X_OK) or _pseudo(there):
        raise UserError(f"{flag} {path}: expected a folder that can be written, but {there} cannot; choose another")


def checked(settings: S) -> S:
    """The settings, paths absolute. Raises UserError naming the first flag that is not what its type says."""
    changed: dict[str, Any] = {}
    for name, value, rules in _rules(settings):
        flag = f"--{name.replace('_', '-')}"
        if is_dataclass(value):
            changed[name] = checked(value)
        elif rules and isinstance(value, tuple):
            changed[name] = tuple(rules[0].check(flag, v) for v in value)
        elif rules and value is not None and not (isinstance(rules[0], Range) and isinstance(value, str)):
            changed[name] = rules[0].check(flag, value)
    return replace(settings, **changed)  # type: ignore[type-var]


def _rules(settings: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        yield name, getattr(settings, name), [m for m in _metadata(hint) if hasattr(m, "check")]


def _metadata(hint: Any) -> Iterator[Any]:
    """What is annotated anywhere within a type."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        if not isinstance(inner, str):
            yield from _metadata(inner)


def _pseudo(folder: Path) -> bool:
    """Whether a folder is the kernel's own, where nobody can make one although permissions allow it."""
    return folder.parts[:2] in (("/", "proc"), ("/", "sys"))


MANY = 10**9
Count = Annotated[int, Range(1, MANY)]
"""At least one."""
Few = Annotated[int, Range(1, 4096)]
"""Processes, shots, views, side lengths in the network's steps: what a machine could not do a million of."""
Seed = Annotated[int, Range(0, 2**63 - 1)]
"""What NumPy and torch take."""
Side = Annotated[int, Range(1, 65536)]
"""Pixels."""
Cores = Annotated[float, Range(0, 4096, closed=False)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1000, closed=False)]
"""A learning rate."""
Fold = Annotated[int, Range(0, 9999)]
FoldsToTrain = Fold | Literal["all", "none"]
Place = Annotated[str, Location()]
"""A path or URL that is read."""
Output = Annotated[str, Location(written=True)]
"""A path or URL of a folder that is written."""
Folder = Annotated[str, Location(written=True, local=True)]
"""A folder of this machine that is written."""
Weights = Annotated[str, Location(hub=True)]
"""A weights file, or one on the hub."""
Picture = Annotated[str, NewFile(".png")]
"""A picture that is written."""
TrackingUri = Annotated[str, Tracking()]
Format = Literal["mask", "labels", "overlay", "video", "probability", "coco", "yolo", "geotiff", "geojson"]
"""What `predict` writes."""
