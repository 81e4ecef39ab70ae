"""Pictures of the ground: a GeoTIFF's place, carried over to masks and outlines. Needs rasterio (the extra `geo`)."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from feature_store.urls import redacted
from fsdino.errors import UserError, first_line

if TYPE_CHECKING:
    from pipelines.outputs import Found

SUFFIXES = frozenset((".tif", ".tiff"))
GEOJSON = "found.geojson"
MOST_PIXELS = 10**9
STRETCH = (2, 98)  # percentiles of a band of more than 8 bits that become black and white


def read(path: str) -> Image.Image | None:
    """A TIFF that has a place on the ground as RGB: its first three bands, or its one; None if it is none.

    Bands of more than 8 bits are stretched between percentiles of what is valid. Raises UserError for one of two bands.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        return None
    rasterio = _rasterio(required=False)
    if rasterio is None or not Path(path).is_file():
        return None
    try:
        with _quietly(rasterio, path) as file:
            if file.crs is None or file.colorinterp[0] == rasterio.enums.ColorInterp.palette:
                return None
            if any(kind.startswith("complex") for kind in file.dtypes):
                raise UserError(f"{path}: expected real numbers, got complex ones; convert it")
            if file.count == 2:
                raise UserError(f"{path}: expected one band, or red, green and blue first, got two")
            if file.width * file.height > MOST_PIXELS:
                raise UserError(
                    f"{path}: expected at most {MOST_PIXELS:,} pixels, got {file.width}x{file.height}; cut it"
                )
            bands = [1, 2, 3] if file.count >= 3 else [1, 1, 1]
            values, valid = file.read(bands), file.dataset_mask() > 0
    except rasterio.errors.RasterioError as error:
        raise UserError(f"{path}: expected a readable GeoTIFF, got: {first_line(error)}") from None
    if values.dtype != np.uint8:
        values = np.stack([_stretched(band, valid) for band in values])
    return Image.fromarray(np.moveaxis(values, 0, -1).copy())


def _stretched(band: np.ndarray, valid: np.ndarray) -> np.ndarray:
    valid = valid & np.isfinite(band)
    low, high = np.percentile(band[valid], STRETCH) if valid.any() else (0, 1)
    grey = np.clip((band.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1)
    return (255 * np.where(valid, grey, 0)).round().astype(np.uint8)


def check(paths: Sequence[str]) -> None:
    """Raises UserError for the first that does not say where it is, or not in a way that longitudes follow from."""
    from rasterio.warp import transform_bounds

    for path in paths:
        with _placed(path) as file:
            try:
                transform_bounds(file.crs, "EPSG:4326", *file.bounds)
            except Exception as error:  # GDAL's own, which rasterio does not name in public
                raise UserError(f"{redacted(path)}: expected a place on the Earth, got: {first_line(error)}") from None


class GeoTiff:
    """A GeoTIFF for each photograph, on its own pixels: 1 to n, the class; 0 where there is none."""

    def __init__(self, out: Path, names: Sequence[str]):
        self.out, self.names = out, names
        self.shared: list[Path] = []

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return [self.out / f"{stem}_labels.tif"]

    def add(self, found: "Found") -> None:
        """See Writer."""
        with _placed(found.query) as source:
            profile = {"crs": source.crs, "transform": source.transform, "height": source.height, "width": source.width}
        profile |= {"driver": "GTiff", "dtype": "uint8", "count": 1, "nodata": 0, "compress": "deflate", "tiled": True}
        with _rasterio().open(self.paths(found.stem)[0], "w", **profile) as file:
            file.write(found.labels, 1)
            file.update_tags(1, **{f"class_{number}": name for number, name in enumerate(self.names, start=1)})

    def close(self) -> None:
        """See Writer."""


class GeoJson:
    """One GeoJSON of all photographs: each connected part of a class as a polygon with its holes, in longitude and
    latitude (RFC 7946)."""

    def __init__(self, out: Path, names: Sequence[str]):
        self.names, self.shared = names, [out / GEOJSON]
        self.features: list[dict[str, Any]] = []

    def paths(self, stem: str) -> list[Path]:
        """See Writer."""
        return []

    def add(self, found: "Found") -> None:
        """See Writer."""
        from rasterio.warp import transform_geom

        from pipelines.outputs import parts, score

        with _placed(found.query) as source:
            crs, transform = source.crs, source.transform
        for name, whole, logits in zip(self.names, found.masks, found.logits, strict=True):
            for place, part in parts(whole, instances=True):
                for outline in _outlines(place, part, transform):
                    geometry = transform_geom(crs, "EPSG:4326", outline)
                    properties = {"class": name, "score": score(place, part, logits), "source": redacted(found.query)}
                    self.features.append({"type": "Feature", "geometry": geometry, "properties": properties})

    def close(self) -> None:
        """See Writer."""
        self.shared[0].write_text(json.dumps({"type": "FeatureCollection", "features": self.features}))


def _outlines(place: tuple[slice, ...], part: np.ndarray, transform: Any) -> Iterator[dict[str, Any]]:
    from rasterio.features import shapes
    from rasterio.transform import Affine

    moved = transform @ Affine.translation(place[1].start, place[0].start)
    for outline, value in shapes(part.astype(np.uint8), part, connectivity=4, transform=moved):
        if value:
            yield outline


def _placed(path: str) -> Any:
    """A file that says where it is. Raises UserError if it does not."""
    rasterio = _rasterio()
    try:
        file = _quietly(rasterio, path)
    except rasterio.errors.RasterioError as error:
        raise UserError(f"{redacted(path)}: expected a GeoTIFF, got: {first_line(error)}") from None
    if file.crs is None:
        file.close()
        raise UserError(
            f"{redacted(path)}: expected a GeoTIFF with a coordinate system, got a picture without; leave "
            "out --format geotiff and geojson"
        )
    return file


def _quietly(rasterio: Any, path: str) -> Any:
    """The file, without a warning if it has no place: we ask ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def _rasterio(required: bool = True) -> Any:
    try:
        import rasterio
        import rasterio.enums
        import rasterio.errors
    except ImportError:
        if not required:
            return None
        raise UserError(
            "--format geotiff, geojson: expected rasterio, which is not installed; install fsdino[geo]"
        ) from None
    return rasterio
