"""Teacher embeddings of the training images, once: photographs in, a sealed teacher store out.

    python -m pipelines.extract_teacher --res 518
    python -m pipelines.extract_teacher --res 518 --images 's3://bucket/photos/**/*.jpg'

The teacher sees each image as the same square that the student sees, at the teacher's own side (SAM: 1024 px).
Cost: VOC's 3,396 training images by the offline recipe took 9 minutes on two cores that other work shared, and 0.4 GB.
"""

from dataclasses import dataclass
from typing import Any

from feature_store import Fingerprint
from fsdino.preprocess import PREPROCESSING
from fsdino.teacher import Teacher, build_teacher
from pipelines import stages
from pipelines.cli import main
from pipelines.recipes import Encoding, Extraction, Places, RecipeName, Teaching


@dataclass(frozen=True)
class Settings:
    """Compute teacher embeddings of the training images into a feature store."""

    recipe: RecipeName
    places: Places
    encoding: Encoding
    teaching: Teaching
    extraction: Extraction
    images: str | None = None
    """Photographs instead of the data set's: a folder, a glob in quotes, or either as an fsspec URL."""


def job(settings: Settings) -> dict[str, Any]:
    """Plan, extract, seal."""
    name, rows = stages.read_rows(settings.places, settings.images, ["train"], num_views=1)

    def build() -> Teacher:
        return build_teacher(settings.teaching.teacher, settings.teaching.teacher_weights)

    teacher, res = build(), settings.encoding.res
    fingerprint = Fingerprint(
        feature="teacher",
        model=teacher.name,
        weights=teacher.digest,
        layers=teacher.layers,
        res_px=teacher.input_px(res),
        grid=teacher.grid(res),
        channels=teacher.channels,
        view_seed=settings.encoding.view_seed,
        preprocessing=PREPROCESSING,
        precision=settings.extraction.precision,
        dtype=settings.extraction.dtype,
    )
    target = stages.Target(stages.store_url(settings.places.store, name, "teacher", res), fingerprint, rows)
    decode = stages.Decode(fingerprint.view_seed, settings.extraction.on_bad_image)
    return stages.extract(
        lambda: stages.Single(build(), "teacher"), decode, [target], settings.extraction, settings.places.tracking_uri
    )


if __name__ == "__main__":
    main(Settings, job)
