"""What a store says of itself: the fingerprint of what made it, and its rows."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Optional

FORMAT_VERSION = 3
COMMANDS = {
    "teacher": "extract_teacher",
    "early": "extract_features",
    "late": "extract_features",
    "embedding": "bake_embeddings",
}
"""Which command fills the store of a feature, for the cure that an error names."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides the numbers in a store. Two stores with equal fingerprints hold equal features."""

    feature: str
    """teacher, early, late or embedding."""
    model: str
    """The network's name, part of the store's place."""
    weights: str
    """Digest of the weights."""
    layer: str
    """Which layer of the network: block2, neck, stride8 ..."""
    norm: str
    """What is applied behind the layer: none, final (the network's own last norm), l2 or channel."""
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
    made_from: Optional["Fingerprint"] = None
    """Of the store that this one was computed from; None if from photographs."""
    format_version: int = FORMAT_VERSION

    def record(self) -> dict[str, Any]:
        """JSON for the store: the fingerprint, and library versions for information only."""
        libraries = ("torch", "timm", "numpy", "zarr", "pillow")
        return {"fingerprint": asdict(self), "versions": {name: _version(name) for name in libraries}}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Fingerprint":
        """The fingerprint of a dict of its fields; those that a later release added are left out."""
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in record.items() if key in known}
        if given.get("made_from") is not None:
            given["made_from"] = cls.of_record(given["made_from"])
        return cls(**given)

    def differences(self, expected: dict[str, Any]) -> list[str]:
        """One `field: expected X, got Y` for each field that differs from what is expected."""
        return _differences(asdict(self), expected)


class Row(NamedTuple):
    """One sample to store: an image under one view, and where the image came from."""

    sample_id: str
    view: int
    source: str


def build_id(fingerprint: Fingerprint, rows: Sequence[Row]) -> str:
    """Eight hex digits of a fingerprint and its rows: markers carry them, so those of another build never count."""
    record = json.dumps([asdict(fingerprint), [(text(row.sample_id), row.view) for row in rows]], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()[:8]


def _differences(own: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """One `field: expected X, got Y` for each leaf of `expected` that `own` differs from."""
    differing = []
    for key, value in expected.items():
        got = own.get(key)
        if isinstance(value, dict) and isinstance(got, dict):
            differing += _differences(got, value, f"{prefix}{key}.")
        elif got != value:
            differing.append(f"{prefix}{key}: expected {value}, got {got}")
    return differing


def text(name: str) -> str:
    """A file's name as Unicode that Parquet takes: names need not be, and then hold escaped bytes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
