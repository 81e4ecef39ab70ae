"""From files to square tensors and back: the only place where pixels are decoded or resized."""

import errno
import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from upath import UPath

from fsdino.errors import UserError

Source = str | Path | UPath
"""A path of this machine, or any fsspec URL."""
PREPROCESSING = "v1: EXIF-transposed, views v1, square bilinear antialiased, x/255, the model's mean and std"
"""Of every stored feature; change its version with anything here or in data/views.py that changes a pixel."""


def read_image(path: Source) -> Image.Image:
    """The photograph at a path or fsspec URL as RGB, turned as its EXIF says (as cv2.imread, which most of the
    benchmarks' readers use, does). Of an animation the first frame; 16-bit grey loses its lower byte; alpha is dropped.

    Raises UserError if the file is missing or is no readable image; OSError if the place it lies on fails.
    """
    return _decoded(path, _rgb)


def _rgb(image: Image.Image) -> Image.Image:
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


def read_label(path: Source) -> UInt8[np.ndarray, "h w"]:
    """A label PNG as class numbers; a palette image gives its indices. 255 is void.

    Raises UserError if the file is missing, unreadable, or has colour channels.
    """
    image = _open(path)
    if image.mode not in ("P", "L", "1"):
        raise UserError(f"{path}: expected a label image of one channel, got mode {image.mode}; save it as greyscale")
    return np.array(image.convert("L") if image.mode == "1" else image, dtype=np.uint8)


def read_mask(path: Source, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """A support mask: every non-zero pixel is the object. `size` is the photograph's (width, height).

    Raises UserError if its size differs from the photograph's, or if no pixel is set.
    """
    image = ImageOps.exif_transpose(_open(path))
    if image.size != size:
        raise UserError(
            f"{path}: expected a mask of the photograph's size {size[0]}x{size[1]}, "
            f"got {image.size[0]}x{image.size[1]}; draw the mask on that photograph"
        )
    # A palette's colours are names, not values: index 0 is the background whatever its colour.
    values = np.array(image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "CMYK") else image)
    mask = np.atleast_3d(values).any(-1)
    if not mask.any():
        raise UserError(
            f"{path}: expected at least one foreground pixel, got none; mark the object with a value above 0"
        )
    return np.asarray(mask, dtype=np.uint8)


def resize_square(image: Image.Image, res_px: int) -> UInt8[np.ndarray, "r r 3"]:
    """The whole image stretched to a square, bilinear with antialiasing."""
    return np.asarray(image.resize((res_px, res_px), Image.Resampling.BILINEAR))


def to_input(
    pixels: UInt8[np.ndarray, "b r r 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b 3 r r"]:
    """Pixels 0-255 to a network's input: scaled to [0, 1], then normalised by its own `mean` and `std`."""
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _open(path: Source) -> Image.Image:
    return _decoded(path, lambda image: image)


def _decoded(path: Source, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
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
