"""Teacher embeddings of the training images, once: photographs in, a sealed teacher store out.

    python -m pipelines.extract_teacher --res 518
    python -m pipelines.extract_teacher --res 518 --images SA-1B --share 0.01      # of its folders or tars

The teacher sees each image as the same square as the student, at the teacher's own side. SAM's is 1024 px whatever
--res says, so students of all resolutions share one store, teacher@1024; a teacher without a side of its own takes the
student's.
Cost: VOC's 3,396 training images by the offline recipe took 9 minutes on two cores that other work shared, and 0.4 GB.
"""

from dataclasses import dataclass
from typing import Any

from feature_store import Fingerprint
from fsdino.preprocess import PREPROCESSING
from fsdino.specs import encoder_spec, teacher_spec
from fsdino.weights import weights_digest
from pipelines import extraction, stores
from pipelines.cli import main
from pipelines.networks import TeacherPlan
from pipelines.recipes import Backbone, Extraction, Photographs, Places, RecipeName, Teaching
from pipelines.stages import Decode


@dataclass(frozen=True)
class Settings:
    """Compute teacher embeddings of the training images into a feature store."""

    recipe: RecipeName
    places: Places
    backbone: Backbone
    teaching: Teaching
    extraction: Extraction
    photographs: Photographs


def job(settings: Settings) -> dict[str, Any]:
    """Plan, extract, seal."""
    teaching, res = settings.teaching, settings.backbone.res
    spec = teacher_spec(teaching.teacher)
    encoder_spec(settings.backbone.encoder).grid(res)  # a side that the student cannot take is of no use
    name, rows = extraction.read_rows(settings.places, settings.photographs, ["train"], num_views=1)
    fingerprint = Fingerprint(
        feature="teacher",
        model=spec.name,
        weights=weights_digest(teaching.teacher, teaching.teacher_weights),
        layer=spec.layer.name,
        norm=spec.layer.norm,
        res_px=spec.input_px(res),
        grid=spec.grid(res),
        channels=spec.layer.channels,
        view_seed=settings.backbone.view_seed,
        preprocessing=PREPROCESSING,
        precision=settings.extraction.precision,
        dtype=settings.extraction.dtype,
    )
    return extraction.extract(
        TeacherPlan(teaching, fingerprint.weights),
        Decode(fingerprint.view_seed, settings.extraction.on_bad_image),
        [extraction.Target(stores.place(settings.places.store, name, fingerprint), fingerprint, rows)],
        settings.extraction,
        settings.places.tracking_uri,
        name,
        (extraction.photographs_input(settings.places, settings.photographs, name, rows),),
    )


if __name__ == "__main__":
    main(Settings, job)
