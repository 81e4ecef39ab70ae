"""Labels and masks: which pixels are which class.

A file is read by what it shows rather than by its mode alone, and where two readings are possible and differ, it is
refused: a mask that is silently another object costs a whole evening.
"""

import warnings

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageOps

from fsdino import paper
from fsdino.errors import DataError, DataWarning, UserError
from fsdino.preprocess import DEEP, FEW_BITS, Source, decoded

WHOLE_SHARE = 0.9  # of the image, above which a mask is more likely inverted than an object
CLASSES_SHOWN = 64  # in one image; of more values some are a soft edge's, or a JPEG's
FEW_LEVELS = 4  # between the extremes: class numbers whatever their shape, as a soft edge has more
BINS, SMALLEST_SHARE = 20, 0.005  # of brightness; of the even areas, from which they are no noise
FLAT_SHARE = 0.5  # of the values between the extremes, above which they are class numbers and no soft edge


def read_label(path: Source) -> UInt8[np.ndarray, "h w"]:
    """A label image as class numbers; a palette image gives its indices. 255 is void.

    A label in VOC's colours is mapped back to numbers. Raises DataError if the file has class numbers above 255, other
    colours, or can be read in two ways, UserError if it is missing or unreadable.
    """
    return _numbers(path, decoded(path, ImageOps.exif_transpose))


def read_mask(path: Source, size: tuple[int, int], value: int | None = None) -> UInt8[np.ndarray, "h w"]:
    """A support mask as 1 on the object and 0 elsewhere. `size` is the photograph's (width, height).

    Of two values the brighter is the object (0 and 1 or 0 and 255, two colours, a palette of two colours); of soft
    edges what reaches half of the range; where colours say nothing, alpha is the mask. An image of several class
    numbers needs `value`, the object's, and is read as a label; its pixels of 255 are then void, 255 here too.

    Raises UserError if the size differs from the photograph's, if no pixel is the object or every pixel is, or if the
    image can be read in two ways; warns (DataWarning) of soft edges, and of an object that covers 90 % of the image.
    """
    image = decoded(path, ImageOps.exif_transpose)
    if image.size != size:
        raise UserError(
            f"{path}: expected a mask of the photograph's size {size[0]}x{size[1]}, "
            f"got {image.size[0]}x{image.size[1]}{_turned(image.size, size)}; draw the mask on that photograph"
        )
    if value is not None:
        mask = _one_value(path, _numbers(path, image), value)
    else:
        mask = _object(path, *_mask_values(path, image)).astype(np.uint8)
    known = mask[mask != paper.VOID]
    if not known.any():
        raise UserError(
            f"{path}: expected at least one foreground pixel, got none; mark the object with a value above 0"
        )
    covered = float(known.mean())
    if covered == 1:
        raise UserError(
            f"{path}: expected an object and a background, got a mask that covers the whole image; mark the "
            "background with 0"
        )
    if covered > WHOLE_SHARE:
        warnings.warn(
            f"{path}: the mask covers {covered:.0%} of the image; if the object is what is left, invert it",
            DataWarning,
            stacklevel=2,
        )
    return mask


def read_binary(path: Source) -> UInt8[np.ndarray, "h w"]:
    """A mask of one class as 1 and 0, read as `read_mask` does; it may be empty, or cover the whole image.

    Raises UserError if it can be read in two ways.
    """
    image = decoded(path, ImageOps.exif_transpose)
    return _object(path, *_mask_values(path, image)).astype(np.uint8)


def binary_label(label: UInt8[np.ndarray, "h w"], class_id: int) -> UInt8[np.ndarray, "h w"]:
    """1 on the class, 0 elsewhere, 255 where the label is void."""
    mask = (label == class_id).astype(np.uint8)
    mask[label == paper.VOID] = paper.VOID
    return mask


def voc_colours() -> UInt8[np.ndarray, "256 3"]:
    """VOC's colour of each class number: bits 0, 3, 6 of the number are the upper bits of red, 1, 4, 7 of green, and
    2, 5 of blue, from the highest down."""
    number = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        colours[:, bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return colours.astype(np.uint8)


def _numbers(path: Source, image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """A label's class numbers. Raises as `read_label`."""
    if image.mode == "P":
        indices, used, colours = _palette(path, image)
        differ = (colours != voc_colours()[used]).any()
        greys = _grey(colours) and (colours[:, 0] != used).any()
        if (_known(colours).all() and differ) or (greys and colours.tolist() != [[0] * 3, [255] * 3]):
            raise DataError(
                f"{path}: its palette shows other numbers than it holds, so the label can be read in two ways; save "
                "class numbers as greyscale"
            )
        return indices
    if image.mode == "1":
        return np.array(image, dtype=np.uint8)
    if image.mode == "L":
        bits = image.info.get(FEW_BITS, 8)  # Pillow spreads 2 and 4 bits over 8
        return (np.asarray(image) // (255 // (2**bits - 1))).astype(np.uint8)
    if image.mode.startswith("I"):
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > paper.VOID:
            wrong = int(numbers.min() if numbers.min() < 0 else numbers.max())
            raise DataError(
                f"{path}: expected class numbers 0 to 255, got {wrong}; save a class per number, not an instance"
            )
        return numbers.astype(np.uint8)
    if image.mode == "F":
        raise DataError(f"{path}: expected a label of class numbers, got floats; save it as 8-bit greyscale")
    _check_depth(path, image)
    alpha = _alpha(image)
    if alpha is not None and np.ptp(alpha):
        raise DataError(f"{path}: expected a label of class numbers, got transparency; save it as 8-bit greyscale")
    return _numbers_of_colours(path, np.asarray(image.convert("RGB")))


def _mask_values(path: Source, image: Image.Image) -> tuple[Int[np.ndarray, "h w"], bool]:
    """A mask's values, the object's highest unless they are class numbers, and whether they are a palette's indices."""
    if image.mode == "P" and "transparency" not in image.info:
        indices, used, colours = _palette(path, image)
        shown = np.zeros(256, np.int64)
        if _grey(colours):  # greys are values, and so are two colours
            shown[used] = colours[:, 0]
            return shown[indices], False
        if len(used) <= 2:
            shown[used] = colours.astype(np.int64).sum(1)
            return shown[indices], False
        return indices.astype(np.int64), True
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: expected a mask of numbers, got some that are not finite; save it as 8 bits")
        levels, positions = np.unique(values, return_inverse=True)
        if len(levels) > 2:
            return np.round((values - values.min()) / np.ptp(values) * 65535).astype(np.int64), False
        return positions.reshape(values.shape).astype(np.int64) + int(len(levels) == 1 and levels[0] > 0), False
    if image.mode in ("1", "L", "I") or image.mode.startswith("I;"):
        if "transparency" not in image.info:
            numbers = np.asarray(image).astype(np.int64)
            if numbers.min() < 0:
                raise UserError(f"{path}: expected a mask of numbers from 0 up, got {numbers.min()}; save it as 8 bits")
            return numbers, False
    _check_depth(path, image)
    alpha, colours = _alpha(image), _colour_values(path, np.asarray(image.convert("RGB")))
    if alpha is None or not np.ptp(alpha):
        return colours, False
    if not np.ptp(colours):
        return alpha, False
    if np.array_equal(_halved(colours), _halved(alpha)):
        return colours, False
    raise UserError(
        f"{path}: its colours and its transparency show different objects; save the mask without transparency, or "
        "in transparency alone"
    )


def _palette(path: Source, image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A palette image's indices, those that are used, and their colours. Raises UserError if some have none."""
    indices = np.asarray(image)
    used = np.flatnonzero(image.histogram()).astype(np.uint8)
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3)).astype(np.uint8)
    if used[-1] >= len(palette):
        raise UserError(f"{path}: expected a palette of {used[-1] + 1} colours, got {len(palette)}; save it again")
    return indices, used, palette[used]


def _grey(colours: np.ndarray) -> bool:
    """Whether all channels of each are equal."""
    return bool((colours == colours[:, :1]).all())


def _colour_values(path: Source, pixels: UInt8[np.ndarray, "h w 3"]) -> Int[np.ndarray, "h w"]:
    """Brightness, or class numbers if the colours are several of VOC's. Raises UserError for several others."""
    levels, positions = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if (np.ptp(levels, axis=1) == 0).all():
        return pixels[..., 0].astype(np.int64)
    if len(levels) > 2 and _known(levels).all():
        return _numbers_of_colours(path, pixels).astype(np.int64)
    if 2 < len(levels) <= CLASSES_SHOWN:
        ranks = np.empty(len(levels), np.int64)
        ranks[np.argsort(levels.astype(np.int64).sum(1), kind="stable")] = np.arange(len(levels))
        if _flat(ranks[positions].reshape(pixels.shape[:2])):
            raise UserError(
                f"{path}: expected a mask of one object, got {len(levels)} colours; save it with one channel, a number "
                "for each object, and choose one with --mask-value"
            )
    return pixels.astype(np.int64).sum(-1)


def _check_depth(path: Source, image: Image.Image) -> None:
    """Raise UserError for colours of 16 bits, of which Pillow keeps the upper half only."""
    if image.info.get(DEEP):
        raise DataError(f"{path}: expected 8 bits for each colour, got 16; save it as 8-bit greyscale")


def _object(path: Source, values: Int[np.ndarray, "h w"], is_palette: bool) -> Bool[np.ndarray, "h w"]:
    """Where the object is in an image of one object."""
    levels = np.unique(values)
    if len(levels) == 1:
        return values > 0
    if len(levels) == 2 and (levels[0] == 0 or not is_palette):
        return values == levels[1]
    if is_palette or len(levels) <= 2 + FEW_LEVELS or _flat(values):
        named = ", ".join(map(str, levels[levels > 0][:12])) + (", ..." if len(levels) > 13 else "")
        raise UserError(f"{path}: expected a mask of one object, got values {named}; choose one with --mask-value")
    between = int(((values > levels[0]) & (values < levels[-1])).sum())
    warnings.warn(
        f"{path}: {between} pixels have values between {levels[0]} and {levels[-1]}; those that reach half of the "
        "range are the object",
        DataWarning,
        stacklevel=3,
    )
    return _halved(values)


def _halved(values: Int[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """What reaches half of the range."""
    return 2 * values >= values.min() + values.max()


def _flat(values: Int[np.ndarray, "h w"]) -> bool:
    """Whether values between the extremes lie in even areas, as class numbers do and soft edges do not.

    Of many values some are a JPEG's noise: then even means nearly so, and the even areas must be of three brightnesses.
    """
    low, high = int(values.min()), int(values.max())
    many = len(np.unique(values)) > CLASSES_SHOWN
    blocks = np.stack([values[:-1, :-1], values[1:, :-1], values[:-1, 1:], values[1:, 1:]])
    even = np.zeros(values.shape, bool)
    even[:-1, :-1] = np.ptp(blocks, axis=0) <= ((high - low) // 25 if many else 0)
    if many:
        counts, _ = np.histogram(values[even], BINS, (low, high))
        filled = np.concatenate([[False], counts >= SMALLEST_SHARE * even.sum()])
        return int((filled[1:] & ~filled[:-1]).sum()) > 2
    between = (values > low) & (values < high)
    return bool((even & between).sum() >= FLAT_SHARE * between.sum())


def _one_value(path: Source, values: UInt8[np.ndarray, "h w"], value: int) -> UInt8[np.ndarray, "h w"]:
    """The object of that class number, void kept."""
    levels = np.unique(values)
    if value not in levels:
        named = ", ".join(map(str, levels[:12])) + (", ..." if len(levels) > 12 else "")
        raise UserError(f"{path}: expected pixels of --mask-value {value}, got values {named}; choose one of those")
    if len(levels) > CLASSES_SHOWN:
        raise UserError(
            f"{path}: expected class numbers for --mask-value, got {len(levels)} values, as a JPEG or soft edges have; "
            "save the label as PNG, or leave --mask-value out for a mask of one object"
        )
    void = (values == paper.VOID) & (value != paper.VOID)
    return np.where(void, paper.VOID, values == value).astype(np.uint8)


def _alpha(image: Image.Image) -> Int[np.ndarray, "h w"] | None:
    """Opacity, None if the image has none."""
    if "A" in image.getbands() or "transparency" in image.info:
        return np.asarray(image.convert("RGBA").getchannel("A")).astype(np.int64)
    return None


def _numbers_of_colours(path: Source, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Class numbers of three equal channels, or of a label in VOC's colours. Raises DataError for other colours."""
    levels, positions = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if (np.ptp(levels, axis=1) == 0).all():
        numbers = levels[:, 0]
    elif _known(levels).all():
        numbers = np.array([_VOC_NUMBERS[tuple(level)] for level in levels.tolist()], np.uint8)
    else:
        strange = tuple(levels[~_known(levels)][0].tolist())
        raise DataError(
            f"{path}: expected class numbers or VOC's colours, got the colour {strange}; replace each colour by its "
            "class number and save one channel (converting to greyscale would make other numbers)"
        )
    return numbers[positions].reshape(pixels.shape[:2])


def _known(levels: UInt8[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
    """Which colours are VOC's."""
    return np.array([tuple(level) in _VOC_NUMBERS for level in levels.tolist()])


def _turned(got: tuple[int, int], expected: tuple[int, int]) -> str:
    return " (turned by a quarter)" if got == expected[::-1] and got[0] != got[1] else ""


_VOC_NUMBERS = {tuple(colour): number for number, colour in enumerate(voc_colours().tolist())}
