"""From files to square pixels: the only place where images are decoded or resized."""

import errno
import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from upath import UPath

from fsdino.errors import UserError

Source = str | Path | UPath
"""A path of this machine, or any fsspec URL."""
PREPROCESSING = "v1"
"""Version of what turns a file into a network's input: turned as EXIF says, drawn as data/views.py says, resized to a
square (bilinear, antialiased), scaled by the network's mean and deviation. Change it with whatever changes a pixel."""


def read_image(path: Source) -> Image.Image:
    """The photograph at a path or fsspec URL as RGB, turned as its EXIF says (as cv2.imread, which most of the
    benchmarks' readers use, does). Of an animation the first frame; 16-bit grey loses its lower byte; alpha is dropped.

    Raises UserError if the file is missing or is no readable image; OSError if the place it lies on fails.
    """
    return decoded(path, to_rgb)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded photograph as `read_image` gives it. Raises ValueError for what has no 8-bit form."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits for a channel")
        wide = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values >> 8 if wide else values).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("channels of floats")
    return image.convert("RGB")


def resize_square(image: Image.Image, res_px: int) -> UInt8[np.ndarray, "r r 3"]:
    """The whole image stretched to a square, bilinear with antialiasing."""
    return np.asarray(image.resize((res_px, res_px), Image.Resampling.BILINEAR))


def decoded(path: Source, use: Callable[[Image.Image], Image.Image] = lambda image: image) -> Image.Image:
    """What `use` makes of the image at a path or URL. Whatever a decoder makes of a bad file is the file's fault."""
    data = _bytes(path)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return use(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not an image of a known format"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, OverflowError and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: expected a readable image, got: {reason}; convert it to JPEG or PNG")


def _bytes(path: Source) -> bytes:
    """The file at a path of this machine or at any fsspec URL. Raises UserError, or OSError if the place fails."""
    remote = isinstance(path, str) and not path.startswith("/") and "://" in path
    try:
        if remote:
            with fsspec.open(path, "rb") as file:
                return file.read()
        return (Path(path) if isinstance(path, str) else path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image file, found nothing there; check the path") from None
    except (zipfile.BadZipFile, zlib.error, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a readable image, got: {error}; check the file") from None
    except OSError as error:
        if error.errno == errno.ELOOP or (isinstance(error, PermissionError) and not remote):
            raise UserError(f"{path}: expected a readable image, got: {error.strerror}; check the file") from None
        raise
    except Exception as error:  # drivers have errors of their own for servers that fail or refuse
        raise OSError(f"{type(error).__name__}: {error}") from None
