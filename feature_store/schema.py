"""What a store says of itself: the fingerprint of what made it, and its rows."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides the numbers in a store. Two stores with equal fingerprints hold equal features."""

    feature: str
    """teacher, early, late or embedding."""
    model: str
    weights: str
    """Digest of the weights, not their file's name."""
    layers: str
    """Which layers, and whether their norm is applied."""
    res_px: int
    grid: int
    channels: int
    view_seed: int
    preprocessing: str
    """How a file becomes the network's input, views included, with a version of its own."""
    precision: str = "fp32"
    """Of the forward pass."""
    dtype: str = "float16"
    """As stored: float16, float32, or int8 (packed, see packing.py)."""
    format_version: int = FORMAT_VERSION

    def record(self) -> dict[str, Any]:
        """JSON for the store: the fingerprint, and library versions as mere information."""
        libraries = ("torch", "timm", "numpy", "zarr", "pillow")
        return {"fingerprint": asdict(self), "versions": {name: _version(name) for name in libraries}}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Fingerprint":
        """The fingerprint in a store's record; fields that a later format added are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in record["fingerprint"].items() if k in known})

    def differences(self, expected: dict[str, Any]) -> list[str]:
        """One `field: expected X, got Y` for each field that differs from what is expected."""
        own = asdict(self)
        return [f"{key}: expected {value}, got {own[key]}" for key, value in expected.items() if own[key] != value]


class Row(NamedTuple):
    """One sample to store: an image under one view, and where the image came from."""

    sample_id: str
    view: int
    source: str


def making(fingerprint: Fingerprint, rows: Sequence[Row]) -> str:
    """Eight hex digits of a fingerprint and its rows: markers carry them, so those of another making never count."""
    record = json.dumps([asdict(fingerprint), [(text(row.sample_id), row.view) for row in rows]], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()[:8]


def text(name: str) -> str:
    """A file's name as Unicode that Parquet takes: names need not be, and then hold escaped bytes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
