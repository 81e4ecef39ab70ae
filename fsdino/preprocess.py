"""From files to square pixels: the only place where images are decoded or resized."""

import errno
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from upath import UPath

from fsdino.errors import DataWarning, UserError, first_line
from fsdino.tars import is_member, read_member

Source = str | Path | UPath
"""A path of this machine, or any fsspec URL."""
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif .heic .heif .avif .jp2 .ppm .pgm".split())
"""What counts as a photograph in a folder; a glob takes whatever it matches. Unsupported ones are found on reading."""
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of formats that are decoded for strangers."""
ORIENTATION = 0x0112  # EXIF's tag
DEEP = "16-bit colour"
"""In an image's info: whether its file has 16 bits for each colour channel."""
FEW_BITS = "bits of grey"
"""In an image's info: of a file of 2 or 4 bits of grey how many."""
PREPROCESSING = "v2"
"""Version of what turns a file into a network's input: turned as EXIF says, drawn as data/views.py says, resized to a
square (bilinear, antialiased), scaled by the network's mean and deviation. Change it with whatever changes a pixel."""


def read_image(path: Source) -> Image.Image:
    """The photograph at a path or fsspec URL as RGB, turned as its EXIF says (as cv2.imread, which most of the
    benchmarks' readers use, does). Of an animation the first frame; alpha is dropped. Grey of more than 8 bits is
    scaled from the bits that its values use (8, 10, 12, 14 or 16), with a DataWarning where those are not all.

    Raises UserError if the file is missing or is no readable image; OSError if the place it lies on fails.
    """
    return decoded(path, lambda image: to_rgb(image, str(path)))


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A decoded photograph as `read_image` gives it. Raises ValueError for what has no 8-bit form."""
    if image.getexif().get(ORIENTATION, 1) != 1:  # else it would copy what may be a gigabyte
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    if image.mode == "F":
        raise ValueError("channels of floats")
    if image.info.get(DEEP):  # Pillow keeps the upper byte of each channel
        brightest = int(np.asarray(image.convert("RGB")).max())
        if brightest < 64:
            raise ValueError(
                f"16-bit colours of which at most {8 + brightest.bit_length()} bits are used; scale them to 16"
            )
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray, name: str) -> UInt8[np.ndarray, "h w"]:
    """Grey values of which the lowest 8, 10, 12, 14 or 16 bits are used, as 8 bits."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("more than 16 bits for a channel")
    used = next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 1 << bits)
    if used < 16:
        warnings.warn(f"{name}: 16-bit grey, scaled from the {used} bits that are used", DataWarning, stacklevel=2)
    return (values >> (used - 8)).astype(np.uint8)


def orientation(path: Source) -> int:
    """EXIF's orientation of a photograph: 1 as stored, 5 to 8 turned by a quarter; 1 where nothing is said."""
    try:
        with Image.open(io.BytesIO(_bytes(path))) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except (UserError, OSError, SyntaxError, ValueError):
        return 1


def shown_size(path: Source) -> tuple[int, int]:
    """(width, height) of a photograph as it is shown, from its header alone. Raises UserError as `read_image`."""
    data = _bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: expected a readable image, got: {first_line(error)}; convert it to JPEG") from None


def resize_square(image: Image.Image, res_px: int) -> UInt8[np.ndarray, "r r 3"]:
    """The whole image stretched to a square, bilinear with antialiasing."""
    return np.asarray(image.resize((res_px, res_px), Image.Resampling.BILINEAR))


def decoded(path: Source, use: Callable[[Image.Image], Image.Image] = lambda image: image) -> Image.Image:
    """What `use` makes of the image at a path or URL. Whatever a decoder makes of a bad file is the file's fault."""
    return _decoded(_bytes(path), str(path), use)


def image_of(data: bytes, name: str, most_pixels: int) -> Image.Image:
    """As `read_image`, of a stranger's bytes: in one of FORMATS, and of at most so many pixels, which is checked before
    any is decoded. Errors call it by the name."""
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN]) as image:
            pixels = image.width * image.height
    except Exception as error:  # as in `_decoded`
        told = "none of a known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{name}: expected a readable image, got {told}; convert it to JPEG or PNG") from None
    if pixels > most_pixels:
        millions = f"{most_pixels / 1e6:g} megapixels, got {pixels / 1e6:.0f}"
        raise UserError(f"{name}: expected an image of at most {millions}; scale it")
    return _decoded(data, name, lambda image: to_rgb(image, name))


def _decoded(data: bytes, name: str, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        raw, deep = str([tile[3] for tile in getattr(image, "tile", ())]), _is_deep_colour(image)
        if getattr(image, "tag_v2", {}).get(262) == 0 and image.mode.startswith("I;16"):
            raise ValueError("16 bits of grey whose zero is white")
        image.load()
        image.info[DEEP] = deep
        if few := re.search("L;([24])'", raw):
            image.info[FEW_BITS] = int(few[1])
        return use(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not an image of a known format"
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: expected an image of at most 178 megapixels, got more ({error}); scale it") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, OverflowError and more
        reason = first_line(error)
    raise UserError(f"{name}: expected a readable image, got: {reason}; convert it to JPEG or PNG")


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a file that was opened, but not decoded, has more than 8 bits for each of several channels."""
    bits = getattr(image, "tag_v2", {}).get(258, ())  # TIFF's BitsPerSample
    raw = str([tile[3] for tile in getattr(image, "tile", ())])  # a PNG's is RGB;16B
    several = image.mode not in ("F", "I") and not image.mode.startswith("I;")
    return several and ((len(bits) > 1 and max(bits) > 8) or re.search(";16[BLN]", raw) is not None)


def _bytes(path: Source) -> bytes:
    """The file at a path of this machine or at any fsspec URL. Raises UserError, or OSError if the place fails."""
    remote = isinstance(path, str) and not path.startswith("/") and "://" in path
    try:
        if is_member(path):
            return read_member(str(path))
        if remote:
            with fsspec.open(path, "rb") as file:
                return file.read()
        return (Path(path) if isinstance(path, str) else path).read_bytes()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image file, found nothing there{_beside(path)}; check the path") from None
    except (zipfile.BadZipFile, zlib.error, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a readable image, got: {error}; check the file") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG) or (
            isinstance(error, PermissionError) and not remote
        ):
            raise UserError(f"{path}: expected a readable image, got: {error.strerror}; check the file") from None
        raise
    except Exception as error:  # drivers have errors of their own for servers that fail or refuse
        raise OSError(f"{type(error).__name__}: {error}") from None


def _beside(path: Source) -> str:
    """A file that differs in case or suffix only, as a hint; local places only."""
    folder, stem = Path(str(path)).parent, Path(str(path)).stem
    if "://" in str(path) or not folder.is_dir():
        return ""
    names = sorted(p.name for p in folder.iterdir() if p.stem.lower() == stem.lower())
    return f" (but {names[0]})" if names else ""
