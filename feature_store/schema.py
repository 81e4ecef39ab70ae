"""What a store says of itself: the fingerprint of what made it, and its rows."""

import importlib.metadata
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides the numbers in a store. Two stores with equal fingerprints hold equal features."""

    feature: str
    """teacher, early, late or embedding."""
    model: str
    weights: str
    """Digest of the weights, not their file's name."""
    layers: str
    res_px: int
    grid: int
    channels: int
    view_seed: int
    preprocessing: str
    """How a file becomes the network's input, views included, with a version of its own."""
    precision: str = "fp32"
    """Of the forward pass."""
    dtype: str = "float16"
    """As stored."""
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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
