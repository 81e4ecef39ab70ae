"""Checkpoints: tensors as safetensors, everything else as JSON of a stated version beside them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdino.errors import UserError

FORMAT_VERSION = 1


def files(name: str) -> tuple[str, str]:
    """The two files of a checkpoint called `name`."""
    return f"{name}.safetensors", f"{name}.json"


def save(folder: str | Path, name: str, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write both files; the JSON last, since it is what a reader looks for."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, description = files(name)
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / tensors)
    text = json.dumps({"format_version": FORMAT_VERSION, **record}, indent=2, sort_keys=True)
    (folder / description).write_text(text + "\n")


def read(folder: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record.

    Raises UserError if the folder holds no such checkpoint, or one of another format version.
    """
    tensors, description = (Path(folder) / file for file in files(name))
    try:
        record = json.loads(description.read_text())
        version = record.get("format_version") if isinstance(record, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{description}: expected format version {FORMAT_VERSION}, got {version}; "
                "load it with the release that wrote it"
            )
        return load_file(tensors), record
    except (FileNotFoundError, NotADirectoryError):
        missing = tensors if description.exists() else description
        raise UserError(f"{folder}: expected a checkpoint with {missing.name}, found none; train it first") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: expected a whole checkpoint, got a damaged one ({error}); write it again") from None
