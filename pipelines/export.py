"""A checkpoint in half the bytes: as float16, to be used and not trained further.

    python -m pipelines.export --checkpoint outputs/runs/.../final --to fsdino/model

Loaded, it is float32 again. `changed` in the result is the largest relative error of any tensor.
"""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

from fsdino.errors import UserError
from pipelines import checkpoints
from pipelines.checks import Output, Place
from pipelines.cli import main


@dataclass(frozen=True)
class Settings:
    """Write a segmenter's checkpoint as float16."""

    checkpoint: Place
    """Checkpoint folder of train_episodic (its `final`)."""
    to: Output
    """Folder for the smaller one: a path or any fsspec URL."""


def job(settings: Settings) -> dict[str, Any]:
    """Halve, write, and say what that changed."""
    if os.path.realpath(settings.checkpoint) == os.path.realpath(settings.to):
        raise UserError(f"--to {settings.to}: expected another folder than --checkpoint's")
    checkpoints.read_record(settings.checkpoint, "segmenter")
    segmenter, _ = checkpoints.load_segmenter(settings.checkpoint)
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    after = segmenter.half().state_dict()
    changed = max(
        float((value - after[key].float()).norm() / value.norm().clamp_min(1e-12)) for key, value in before.items()
    )
    if not all(value.isfinite().all() for value in after.values()):
        raise UserError(f"{settings.checkpoint}: expected weights within float16's range, got larger ones")
    with tempfile.TemporaryDirectory() as folder:
        segmenter.save_pretrained(folder)
        checkpoints.publish(folder, settings.to)
    size = sum(value.nbytes for value in after.values())
    return {
        "checkpoint": settings.to,
        "bytes": size,
        "parameters": sum(v.numel() for v in after.values()),
        "changed": changed,
    }


if __name__ == "__main__":
    main(Settings, job)
