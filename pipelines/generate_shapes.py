"""A generated data set in VOC's layout, for a first try without any download.

python -m pipelines.generate_shapes --data outputs/shapes --images 500
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fsdino.data.shapes import CLASSES, write_shapes
from pipelines.checks import Count, Folder, Range, Seed
from pipelines.cli import main


@dataclass(frozen=True)
class Settings:
    """Write a data set of textured shapes: 12 classes, three to a fold, a quarter of the images for testing."""

    data: Folder = "outputs/shapes"
    """Folder to write."""
    images: Count = 500
    """Number of images."""
    side: Annotated[int, Range(64, 4096)] = 400
    """Side of an image in pixels."""
    seed: Seed = 0
    """Image i depends on (seed, i) alone."""


def job(settings: Settings) -> dict[str, Any]:
    """Draw and write."""
    write_shapes(settings.data, settings.images, settings.seed, settings.side)
    return {"data": settings.data, "images": settings.images, "classes": CLASSES}


if __name__ == "__main__":
    main(Settings, job)
