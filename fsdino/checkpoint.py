"""Checkpoints: tensors as safetensors, everything else as JSON of a stated version beside them, their hash included."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdino.errors import UserError

if TYPE_CHECKING:  # a record is read without torch
    from torch import Tensor

FORMAT_VERSION = 2
SHIPPED = Path(__file__).parent / "model"
"""The checkpoint that comes with the package: `offline` trained on all of VOC's classes; its README is its card."""


def files(name: str) -> tuple[str, str]:
    """The two files of a checkpoint called `name`."""
    return f"{name}.safetensors", f"{name}.json"


def save(folder: str | Path, name: str, state: "dict[str, Tensor]", record: dict[str, Any]) -> None:
    """Write both files; the JSON last, since it is what a reader looks for."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, description = files(name)
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / tensors)
    record = {**record, "format_version": FORMAT_VERSION, "sha256": _sha256(folder / tensors)}
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    (folder / description).write_text(text + "\n")


def read_record(folder: str | Path, name: str) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises UserError if the folder holds no such checkpoint, or one of another format version.
    """
    description = Path(folder) / files(name)[1]
    try:
        record = json.loads(description.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(folder, description) from None
    except ValueError as error:
        raise _damaged(folder, error) from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{description}: expected format version {FORMAT_VERSION}, got {version}; train it again, or load it with "
            "the release that wrote it"
        )
    return record


def read(folder: str | Path, name: str) -> tuple["dict[str, Tensor]", dict[str, Any]]:
    """Tensors and record. Raises UserError as `read_record`, or if the tensors are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record, tensors = read_record(folder, name), Path(folder) / files(name)[0]
    try:
        if _sha256(tensors) != record["sha256"]:
            raise _damaged(folder, f"the SHA-256 of {tensors.name} is not the one that {files(name)[1]} states")
        return load_file(tensors), record
    except FileNotFoundError:
        raise _absent(folder, tensors) from None
    except (ValueError, KeyError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _absent(folder: str | Path, file: Path) -> UserError:
    return UserError(f"{folder}: expected a checkpoint with {file.name}, found none; train it first")


def _damaged(folder: str | Path, error: Exception | str) -> UserError:
    return UserError(
        f"{folder}: expected a whole checkpoint, got a damaged one ({error}); remove it and rerun what wrote it"
    )
