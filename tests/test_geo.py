"""GeoTIFF in; labels and outlines on the ground out, opened by rasterio itself."""

import json

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import transform_geom

from fsdino.errors import UserError
from pipelines import geo
from tests.conftest import run

SIDE, CRS_METRES = 120, "EPSG:32632"
PLACE = from_origin(500_000, 5_300_000, 2.0, 2.0)  # pixels of two metres


def scene():
    """An orange field in a green ground, with a hole, and its mask."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[30:90, 20:80] = True
    mask[50:70, 40:60] = False
    return np.where(mask[..., None], (230, 120, 30), (60, 130, 50)).astype(np.uint8), mask


@pytest.fixture
def fields(tmp_path):
    """The scene as a GeoTIFF of 8 bits, one of four bands of 16, its mask, and a class file."""
    colours, mask = scene()
    common = {"driver": "GTiff", "height": SIDE, "width": SIDE, "crs": CRS_METRES, "transform": PLACE}
    with rasterio.open(tmp_path / "field.tif", "w", count=3, dtype="uint8", **common) as file:
        file.write(np.moveaxis(colours, -1, 0))
    deep = np.concatenate(
        [np.moveaxis(colours, -1, 0).astype(np.uint16) * 9 + 100, np.full((1, SIDE, SIDE), 7, np.uint16)]
    )
    with rasterio.open(tmp_path / "deep.tif", "w", count=4, dtype="uint16", **common) as file:
        file.write(deep)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path


def test_bands_of_more_than_eight_bits_are_stretched_to_what_they_show(fields):
    plain, deep = (np.asarray(geo.read(str(fields / name))) for name in ("field.tif", "deep.tif"))
    colours, mask = scene()
    assert (plain == colours).all()
    assert (deep[mask] == (255, 0, 0)).all(), "orange has more red, and less green and blue, than the ground"
    assert (deep[~mask] == (0, 255, 255)).all()
    assert geo.read(str(fields / "mask.png")) is None


def test_pixels_without_a_value_are_black_and_stretch_nothing(fields):
    values = np.linspace(10, 20, SIDE * SIDE, dtype=np.float32).reshape(1, SIDE, SIDE)
    values[0, :10], values[0, 10:20] = np.nan, -9999
    common = {"driver": "GTiff", "height": SIDE, "width": SIDE, "crs": CRS_METRES, "transform": PLACE, "nodata": -9999}
    with rasterio.open(fields / "gaps.tif", "w", count=1, dtype="float32", **common) as file:
        file.write(values)
    grey = np.asarray(geo.read(str(fields / "gaps.tif")))[..., 0]
    assert (grey[:20] == 0).all()
    low, high = np.percentile(values[0, 20:], (2, 98))
    expected = np.clip((values[0, 20:] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(grey[20:], expected, atol=1)


def test_masks_lie_where_the_photograph_lies(fields):
    out = fields / "out"
    line = ["--class", "field", f"{fields / 'field.tif'}={fields / 'mask.png'}", "--query", fields / "field.tif"]
    run("predict", *line, "--format", "geotiff", "geojson", "mask", "--out", out)
    found = np.asarray(Image.open(out / "field.png")) > 0
    _, mask = scene()
    assert (found & mask).sum() / (found | mask).sum() > 0.5
    with rasterio.open(out / "field_labels.tif") as file:
        assert (file.crs, file.transform, file.nodata) == (CRS.from_string(CRS_METRES), PLACE, 0)
        assert (file.read(1) == found).all() and file.tags(1)["class_1"] == "field"
    record = json.loads((out / "found.geojson").read_text())
    assert {f["properties"]["class"] for f in record["features"]} == {"field"}
    back = [transform_geom("EPSG:4326", CRS_METRES, f["geometry"]) for f in record["features"]]
    drawn = rasterize(back, out_shape=(SIDE, SIDE), transform=PLACE) > 0
    assert (drawn == found).mean() > 0.999, "outlines are the mask's, holes and all"
    longitude, latitude = record["features"][0]["geometry"]["coordinates"][0][0]
    assert 8.9 < longitude < 9.1 and 47 < latitude < 48.5  # the zone's middle meridian is 9 degrees east


def test_a_picture_without_a_place_is_refused(fields):
    Image.fromarray(scene()[0]).save(fields / "plain.tif")
    line = ["--support", fields / "plain.tif", "--mask", fields / "mask.png", "--query", fields / "plain.tif"]
    with pytest.raises(UserError, match="without; leave out --format geotiff"):
        run("predict", *line, "--format", "geotiff", "--out", fields / "out")


def test_a_geotiff_of_two_bands_is_refused(fields):
    common = {"driver": "GTiff", "height": 8, "width": 8, "crs": CRS_METRES, "transform": PLACE}
    with rasterio.open(fields / "two.tif", "w", count=2, dtype="uint8", **common) as file:
        file.write(np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match="got two"):
        geo.read(str(fields / "two.tif"))
