"""From weights files into networks, and what identifies a network's state."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fsdino import paper, specs
from fsdino.decoder import MaskDecoder, PositionalEncoding, mask_downscaling
from fsdino.errors import UserError
from fsdino.peak import PeakPrompt
from fsdino.weights import weights_file

_SAM_PARTS = {
    "mask_decoder.": "decoder.",
    "prompt_encoder.mask_downscaling.": "mask_downscaling.",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "positional_encoding.gaussian",
}
"""SAM's key names to the segmenter's."""
_SAM_POINTS = {
    "mask_decoder.": "decoder.",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "positional_encoding.gaussian",
    "prompt_encoder.point_embeddings.0.weight": "background_point.weight",
    "prompt_encoder.point_embeddings.1.weight": "foreground_point.weight",
    "prompt_encoder.not_a_point_embed.weight": "not_a_point_embed.weight",
    "prompt_encoder.no_mask_embed.weight": "no_mask_embed.weight",
}
"""SAM's key names to those of `PeakPrompt`."""


def load_state(
    network: nn.Module,
    name: str,
    local: str | Path | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Load the published weights `name`, or those that `local` names, into `network`; never runs code from the file.

    `local` is a file (.pth, .safetensors) or a hub id (`hf:ORGANISATION/NAME`). Raises UserError naming the keys that
    are missing, unknown or of another shape.
    """
    path = weights_file(name, local)
    assert path is not None
    state = convert(_read(path, local))
    check_state(state, network.state_dict(), name, path, local)
    network.load_state_dict(state)


def sam_decoder_state(name: str, weights: str | None = None) -> dict[str, Tensor]:
    """SAM's mask decoder, mask downscaling and Gaussian matrix, under the names of `Segmenter`.

    Only these are read: SAM itself, 640 M parameters for ViT-H, is not built. Raises UserError as `load_state`.
    """
    wanted = {f"decoder.{key}": value for key, value in MaskDecoder().state_dict().items()}
    wanted |= {f"mask_downscaling.{k}": v for k, v in mask_downscaling(paper.EMBEDDING_CHANNELS).state_dict().items()}
    wanted["positional_encoding.gaussian"] = PositionalEncoding(paper.EMBEDDING_CHANNELS).gaussian
    return _sam_state(name, weights, _SAM_PARTS, wanted)


def sam_prompt_state(name: str, weights: str | None = None) -> dict[str, Tensor]:
    """SAM's mask decoder and what its prompt encoder needs for points, under the names of `PeakPrompt`."""
    return _sam_state(name, weights, _SAM_POINTS, PeakPrompt().state_dict())


def _sam_state(
    name: str, weights: str | None, parts: Mapping[str, str], wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    if name not in specs.SAM:
        raise UserError(f"--sam-decoder {name}: no such checkpoint; known are {', '.join(specs.SAM)}")
    path = weights_file(name, weights)
    assert path is not None
    state = {}
    for key, value in _read(path, weights).items():
        for theirs, ours in parts.items():
            if key.startswith(theirs):
                state[ours + key.removeprefix(theirs)] = value.clone()  # a copy, not a view of the whole file
    check_state(state, wanted, name, path, weights)
    return state


def check_state(
    state: dict[str, Tensor], wanted: dict[str, Tensor], name: str, path: Path, local: str | Path | None
) -> None:
    """Raise UserError naming the keys that are missing, unknown or of another shape."""
    wrong = [f"missing {key}" for key in wanted if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in wanted]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"{_aside(path, local)}: expected the weights of {name}, got another network's: {shown}")


def _read(path: Path, local: str | Path | None) -> dict[str, Tensor]:
    """The tensors of a weights file, mapped into memory where its format allows; never runs code from it."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        mapped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike for a bad file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{_aside(path, local)}: expected a PyTorch state dict, got: {first}; download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{_aside(path, local)}: expected a dict of tensors, got something else; download it again")
    return state


def _aside(path: Path, local: str | Path | None) -> Path:
    """The path of a useless file; one of our own cache is renamed, so that the next run downloads it."""
    if local:
        return path
    with suppress(OSError):  # another process may have been first
        return path.rename(path.with_name(f"{path.name}.useless"))
    return path


def efficientnet_lite_state(name: str, network: nn.Module) -> dict[str, Tensor]:
    """ImageNet weights of an EfficientNet-Lite under timm's names.

    The package's tensors are in timm's order; a features-only network drops the last ones.
    """
    path = weights_file(name)
    assert path is not None
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    return dict(zip(network.state_dict(), tensors, strict=False))


def state_digest(network: nn.Module) -> str:
    """Sixteen hex digits of the SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
