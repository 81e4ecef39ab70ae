"""int8 features: values in groups of 64 channels, each with its own fp16 scale, in one array that Zarr can hold.

Half the bytes of fp16. A token of `channels` values is stored as `channels` int8 codes, then the bytes of its scales.
"""

import numpy as np

GROUP = 64


def stored_channels(channels: int, dtype: str) -> int:
    """Length of the array's last axis."""
    return channels + 2 * groups(channels) if dtype == "int8" else channels


def sample_bytes(grid: int, channels: int, dtype: str) -> int:
    """Bytes of one stored sample, without checksum."""
    return grid * grid * stored_channels(channels, dtype) * np.dtype(dtype).itemsize


def groups(channels: int) -> int:
    """Groups of 64 channels; the last may be part full."""
    return -(-channels // GROUP)


def pack(features: np.ndarray) -> np.ndarray:
    """Finite features (..., channels) to codes and scales (..., stored channels) int8.

    A group's scale is its largest magnitude / 127, so the error is at most half of that, and rounding of the scale.
    """
    channels = features.shape[-1]
    padded = np.zeros((*features.shape[:-1], groups(channels) * GROUP), np.float32)
    padded[..., :channels] = features
    grouped = padded.reshape(*features.shape[:-1], -1, GROUP)
    with np.errstate(over="ignore"):
        scales = (np.abs(grouped).max(-1) / 127).astype(np.float16)
    if not (scales.astype(np.float32) * 127 <= np.finfo(np.float16).max).all():
        raise OverflowError("a value is beyond float16, in which features are read")
    divisor = np.where(scales == 0, np.float16(1), scales).astype(np.float32)[..., None]
    codes = np.clip(np.rint(grouped / divisor), -127, 127).astype(np.int8).reshape(padded.shape)
    return np.concatenate([codes[..., :channels], scales.view(np.int8)], axis=-1)


def unpack(stored: np.ndarray, out: np.ndarray) -> None:
    """Codes and scales (..., stored channels) int8 into features `out` (..., channels) of a float type."""
    channels = out.shape[-1]
    scales = np.ascontiguousarray(stored[..., channels:]).view(np.float16).astype(np.float32)
    for group in range(scales.shape[-1]):
        inside = slice(group * GROUP, min((group + 1) * GROUP, channels))
        np.multiply(stored[..., inside], scales[..., group, None], out=out[..., inside], casting="unsafe")
