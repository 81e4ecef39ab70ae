"""Hostile images: each gives the right pixels, or one line that says why not."""

import contextlib
import io
import os
import struct
import zipfile
import zlib

import fsspec
import numpy as np
import pytest
from PIL import Image

from feature_store import FeatureStore
from fsdino.data.photographs import list_photographs, set_name
from fsdino.errors import DataWarning, UserError
from fsdino.preprocess import read_image
from tests.conftest import run

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY = np.arange(2400, dtype=np.uint8).reshape(40, 60)


def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def jpeg(image=None, **how):
    return encoded(image or Image.fromarray(PIXELS), "JPEG", quality=95, **how)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of a few kilobytes that says it is `side` pixels wide and high."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    return encoded(Image.fromarray(PIXELS), "PNG", exif=exif)


def animation():
    frames = [Image.fromarray(np.full((40, 60, 3), v, np.uint8)) for v in (10, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def heic():
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


RGB = np.dstack([GREY] * 3)
PALETTE = Image.fromarray(PIXELS).quantize(64)
READABLE = {
    "grey.png": (encoded(Image.fromarray(GREY), "PNG"), RGB),
    "sixteen bits.png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), RGB),
    "sixteen bits.tif": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), RGB),
    "two colours.png": (encoded(Image.fromarray(GREY > 99), "PNG"), np.where(RGB > 99, 255, 0)),
    "palette.png": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "alpha.png": (encoded(Image.fromarray(np.dstack([PIXELS, GREY])), "PNG"), PIXELS),
    "grey and alpha.png": (encoded(Image.fromarray(np.dstack([GREY, GREY]), "LA"), "PNG"), RGB),
    "turned.png": (turned(), np.rot90(PIXELS, -1)),
    "animated.gif": (animation(), np.full((40, 60, 3), 10)),
    "cmyk.tif": (encoded(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), PIXELS),
    "really a png.jpg": (encoded(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "new\nline.png": (encoded(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "Фото 写真 🐈.png": (encoded(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "hash#question?percent%20.png": (encoded(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "two::colons.png": (encoded(Image.fromarray(PIXELS), "PNG"), PIXELS),
    "one pixel.png": (encoded(Image.fromarray(PIXELS[:1, :1]), "PNG"), PIXELS[:1, :1]),
}
UNREADABLE = {
    "truncated.jpg": (jpeg()[:900], "truncated"),
    "half a header.jpg": (jpeg()[:20], "expected a readable image"),
    "zero bytes.jpg": (b"", "not an image of a known format"),
    "text.jpg": (b"It is only text that is called .jpg\n" * 9, "not an image of a known format"),
    "bomb.png": (bomb(60_000), "at most 178 megapixels"),
    "broken.png": (bomb(100)[:-40], "expected a readable image"),
    "photo.heic": (heic(), "not an image of a known format"),
    "floats.tif": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "channels of floats"),
    "32 bits.tif": (encoded(Image.fromarray(GREY.astype(np.int32) * 100_000), "TIFF"), "more than 16 bits"),
}


@pytest.fixture
def hostile(tmp_path):
    """A folder with all of them, a folder below, and links that lead in circles."""
    folder = tmp_path / "photos of mine"
    (folder / "inner").mkdir(parents=True)
    for name, (data, _) in (READABLE | UNREADABLE).items():
        (folder / name).write_bytes(data)
    (folder / "inner" / "plain.jpg").write_bytes(jpeg())
    (folder / "inner" / "back").symlink_to(folder)
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "nowhere.jpg").symlink_to(folder / "does not exist.jpg")
    (folder / "notes.txt").write_text("not a photograph")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("name", READABLE)
def test_an_odd_image_gives_the_right_pixels(tmp_path, name):
    data, expected = READABLE[name]
    (tmp_path / name).write_bytes(data)
    assert np.array_equal(np.asarray(read_image(str(tmp_path / name))), expected)


DARK = GREY.astype(np.uint16)  # 0 to 255


@pytest.mark.parametrize(("bits", "values"), [(8, DARK), (10, DARK << 2), (12, DARK << 4), (14, DARK << 6)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_fewer_bits_than_its_file_has_is_scaled_with_a_note(tmp_path, bits, values, kind):
    (tmp_path / "deep.x").write_bytes(encoded(Image.fromarray(values), kind))
    with pytest.warns(DataWarning, match=f"deep.x: 16-bit grey, scaled from the {bits} bits that are used"):
        assert np.array_equal(np.asarray(read_image(str(tmp_path / "deep.x"))), RGB)
    if kind == "TIFF":
        (tmp_path / "deep.x").write_bytes(encoded(Image.fromarray(values.astype(np.int32)), kind))
        with pytest.warns(DataWarning, match=f"scaled from the {bits} bits"):
            assert np.array_equal(np.asarray(read_image(str(tmp_path / "deep.x"))), RGB)


def png_of_16_bits(pixels):
    """A PNG of 16 bits for each of three channels, which Pillow reads but does not write."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_colours_of_16_bits_keep_their_upper_byte_and_are_refused_where_it_is_dark(tmp_path):
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(PIXELS.astype(np.uint16) * 257))
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "deep.png"))), PIXELS)
    (tmp_path / "dark.png").write_bytes(png_of_16_bits(PIXELS.astype(np.uint16) << 4))
    with pytest.raises(UserError, match="16-bit colours of which at most 12 bits are used; scale them to 16"):
        read_image(str(tmp_path / "dark.png"))


def test_a_name_in_another_case_or_of_another_kind_is_hinted_at(tmp_path):
    (tmp_path / "Cat.PNG").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    with pytest.raises(UserError, match=r"cat\.jpg: expected an image file, found nothing there \(but Cat\.PNG\)"):
        read_image(str(tmp_path / "cat.jpg"))


def test_a_cmyk_jpeg_looks_like_itself(tmp_path):
    smooth = np.dstack([np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8) + v for v in (0, 60, 120)])
    (tmp_path / "cmyk.jpg").write_bytes(jpeg(Image.fromarray(smooth).convert("CMYK")))
    got = np.asarray(read_image(str(tmp_path / "cmyk.jpg"))).astype(int)
    assert np.abs(got - smooth).mean() < 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unusable_image_says_why_in_one_line(tmp_path, name):
    data, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        read_image(str(tmp_path / name))
    assert "\n" not in str(caught.value).replace(str(tmp_path / name), "")


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    path.chmod(0)
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o5)
    own = os.geteuid()
    try:
        if own == 0:
            os.seteuid(65534)  # nobody; root may read anything
        with pytest.raises(UserError, match="Permission denied"):
            read_image(str(path))
    finally:
        os.seteuid(own)


def test_a_folder_is_searched_once_whatever_its_links_say(hostile):
    found = list_photographs(str(hostile))
    assert "inner/plain.jpg" in found and "notes.txt" not in found and "pipe" not in found
    assert set(READABLE) | set(UNREADABLE) | {"itself.jpg", "nowhere.jpg", "inner/plain.jpg"} == set(found)
    assert list(found) == sorted(found)


def test_globs_match_as_in_a_shell(hostile):
    assert list(list_photographs(f"{hostile}/*.gif")) == ["animated.gif"]
    assert list(list_photographs(f"{hostile}/*/*.jpg")) == ["inner/plain.jpg"]
    assert "inner/plain.jpg" in list_photographs(f"{hostile}/**/*.jpg")
    assert list(list_photographs(f"{hostile}/[gt]*y.png")) == ["grey.png"]
    assert list(list_photographs(str(hostile / "grey.png"))) == ["grey.png"]


def test_a_folder_may_be_called_like_a_pattern(tmp_path):
    (tmp_path / "[1]").mkdir()
    (tmp_path / "[1]" / "a.png").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    assert list(list_photographs(str(tmp_path / "[1]"))) == ["a.png"]


def test_no_photograph_at_all_is_the_users_mistake(tmp_path):
    for place in (str(tmp_path), str(tmp_path / "none"), f"{tmp_path}/*.jpg"):
        with pytest.raises(UserError, match="expected photographs, found none"):
            list_photographs(place)


def test_sets_are_called_after_their_folder():
    assert set_name("/photos of mine/")[:-6] == "photos-of-mine-"
    assert set_name("s3://bucket/cats/**/*.jpg")[:-6] == "cats-"
    assert set_name("zip://*.jpg::/data/cats.zip")[:-6] == "cats.zip-"
    assert set_name("/camera1/frames") != set_name("/camera2/frames")


def test_photographs_in_a_bucket(s3_endpoint):
    fs = fsspec.filesystem("s3")
    for name in ("a b.png", "inner/c.png", "notes.txt"):
        fs.pipe_file(f"features/photos/{name}", encoded(Image.fromarray(PIXELS), "PNG"))
    found = list_photographs("s3://features/photos")
    assert found == {"a b.png": "s3://features/photos/a b.png", "inner/c.png": "s3://features/photos/inner/c.png"}
    assert list(list_photographs("s3://features/photos/*.png")) == ["a b.png"]
    assert np.array_equal(np.asarray(read_image(found["inner/c.png"])), PIXELS)


def test_names_in_an_archive_lead_nowhere_outside_it(tmp_path):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("plain.png", "../../escape.png", "/absolute.png"):
            file.writestr(name, encoded(Image.fromarray(PIXELS), "PNG"))
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    for source in list_photographs(f"zip://*.png::{archive}").values():
        with contextlib.suppress(UserError):
            assert np.array_equal(np.asarray(read_image(source)), PIXELS)
    assert sorted(p for p in tmp_path.parent.rglob("*")) == before


def test_an_extraction_keeps_what_is_good_and_lists_what_is_not(hostile, tmp_path):
    """The whole of it by the real command, with a share of bad images that the default would not allow."""
    places = ["--recipe", "tiny", "--store", tmp_path / "stores", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    arguments = [*places, "--data", tmp_path, "--images", hostile]
    with pytest.raises(UserError, match=r"more than --max-bad-share 0\.01"):
        run("extract_features", *arguments)
    done = run("extract_features", *arguments, "--max-bad-share", 0.9)
    bad = set(UNREADABLE) | {"itself.jpg", "nowhere.jpg"}
    assert done["quarantined"] == len(bad)
    store = FeatureStore(done["stores"][1])
    assert {sample_id for sample_id, _ in store.quarantined} == bad
    assert {row.sample_id for row in store.samples} == bad | set(READABLE) | {"inner/plain.jpg"}
    same = [name for name, (_, pixels) in READABLE.items() if np.array_equal(pixels, PIXELS)]
    features = store.rows(same, [0] * len(same))
    assert len(same) > 4 and np.isfinite(features).all() and (features == features[0]).all()
