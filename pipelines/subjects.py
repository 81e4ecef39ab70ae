"""What `evaluate` scores: a trained segmenter or a method without training, and the features that belong to it."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from feature_store import FeatureStore, Fingerprint
from fsdino.config import SegmenterConfig
from fsdino.data.folds import in_words
from fsdino.errors import UserError
from fsdino.specs import check_layer
from fsdino.weights import check_digest, weights_digest
from pipelines import checkpoints, stores
from pipelines.recipes import Backbone, model_run, model_title
from pipelines.scoring_plan import MethodPlan

if TYPE_CHECKING:
    from pipelines.evaluate import Settings


@dataclass(frozen=True)
class Subject:
    """What is scored, and on which features."""

    title: str
    plan: MethodPlan
    late: FeatureStore | None
    query: FeatureStore | None
    identity: dict[str, Any]
    trained_on: str | None
    trained_by: str | None
    """MLflow's run whose last weights it has."""


def subject(settings: "Settings", dataset: str) -> Subject:
    """What the settings ask for."""
    return _segmenter(settings, dataset) if settings.method == "segmenter" else _baseline(settings, dataset)


def _segmenter(settings: "Settings", dataset: str) -> Subject:
    """A trained segmenter, and the features that it was trained on: embeddings, or `early` for a joint adapter.

    Raises UserError if the checkpoint was trained on other features, or for another fold.
    """
    places = settings.places
    folder = checkpoints.run_folder(places, dataset, settings.backbone)
    url = settings.checkpoint or f"{folder}/{model_run(settings.fold, settings.model, settings.recipe)}/final"
    late = query = None
    if not settings.from_images:
        late = stores.open_encoded(places, dataset, "late", settings.backbone, settings.backbone.res)
    record = checkpoints.read_record(url, "segmenter")
    if "late" not in record or "run" not in record:
        raise UserError(f"{url}: the checkpoint does not say what it was trained on; use one written by train_episodic")
    if _family(record["dataset"]) == _family(dataset) and record["fold"] != settings.fold:
        cure = "a data set whose classes it has not seen" if record["fold"] is None else in_words(record["fold"])
        raise UserError(
            f"{url}: trained for {in_words(record['fold'])}, so it has seen the classes of fold {settings.fold}; "
            f"evaluate it on {cure}"
        )
    trained_on, backbone = Fingerprint.of_record(record["late"]), Backbone(**record["backbone"])
    if late is None:
        backbone = replace(backbone, encoder_weights=settings.backbone.encoder_weights or backbone.encoder_weights)
        check_digest(backbone.encoder, backbone.encoder_weights, trained_on.weights)
        check_layer(record)
        fingerprint = stores.encoded_fingerprint(backbone, "late", backbone.res, trained_on.weights)
    else:
        fingerprint = late.fingerprint
        decisive = ("model", "weights", "layer", "norm", "res_px", "preprocessing")
        differing = trained_on.differences({key: getattr(fingerprint, key) for key in decisive})
        if differing:
            raise UserError(
                f"{url}: trained on other features than {late.url} ({'; '.join(differing)}); pass the --store or --res "
                "it was trained with"
            )
        if record["adapter"]["kind"] != "joint":
            query = stores.open_embedding(places, dataset, record["adapter"]["digest"], backbone, late)
        else:
            query = stores.open_encoded(places, dataset, "early", backbone, backbone.res)
            stores.check_weights(query, fingerprint.weights)
    model = SegmenterConfig(**record["config"])
    empties = model.presence and not settings.keep_masks
    kept = "-masks-kept" if model.presence and settings.keep_masks else ""
    return Subject(
        title=model_title(model, record["recipe"]) + selection(record) + kept,
        plan=MethodPlan("segmenter", url, backbone, empties=empties),
        late=late,
        query=query,
        identity={
            "late": asdict(fingerprint),
            "model": model.record(),
            **({"empties": empties} if model.presence else {}),
            "checkpoint": record["sha256"][:16],
            "trained": record["run"],
            "query": None if query is None else asdict(query.fingerprint),
        },
        trained_on=f"{record['dataset']}, {in_words(record['fold'])}",
        trained_by=None if "selected" in record else record.get("run_id"),  # what is registered are the last weights
    )


def selection(record: dict[str, Any]) -> str:
    """What chose a checkpoint's weights, as part of its name; nothing for the last ones of a training."""
    return f"-best-on-{record['selected']['on']}" if "selected" in record else ""


def _baseline(settings: "Settings", dataset: str) -> Subject:
    """A method without training. Raises UserError if it lacks what it prompts."""
    places, backbone = settings.places, settings.backbone
    late = query = adapter = None
    if settings.from_images:
        digest = weights_digest(backbone.encoder, backbone.encoder_weights)
        fingerprint = stores.encoded_fingerprint(backbone, "late", backbone.res, digest)
    else:
        late = stores.open_encoded(places, dataset, "late", backbone, backbone.res)
        fingerprint = late.fingerprint
        if settings.method == "matching":  # it encodes an empty image
            stores.check_weights(late, weights_digest(backbone.encoder, backbone.encoder_weights))
    decoder = settings.model.sam_decoder if settings.method == "peak" else None
    if settings.method == "peak":
        if decoder is None:
            raise UserError(
                f"--method peak: expected a decoder that takes points, but recipe {settings.recipe} has none of SAM's; "
                "name one with --sam-decoder"
            )
        adapter = checkpoints.plan_adapter(
            places,
            dataset,
            backbone,
            settings.teaching,
            settings.model,
            fingerprint.weights,
            settings.adapter_checkpoint,
        )
        if late is not None:
            query = stores.open_embedding(places, dataset, adapter.digest, backbone, late)
    return Subject(
        title=str(settings.method),
        plan=MethodPlan(settings.method, "", backbone, adapter, decoder, settings.decoder_weights),
        late=late,
        query=query,
        identity={
            "late": asdict(fingerprint),
            "model": None,
            "checkpoint": decoder and weights_digest(decoder, settings.decoder_weights),
            "trained": None,
            "query": adapter and adapter.digest,
        },
        trained_on=None,
        trained_by=None,
    )


def _family(dataset: str) -> str:
    """Data sets of the same classes in the same folds."""
    return dataset.removesuffix("-2017") if dataset.startswith("coco-20i") else dataset
