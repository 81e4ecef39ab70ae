"""A segmenter as MLflow serves it: photographs and masks of a class in, masks of that class out.

MLflow copies this file into the model and runs it where the model is loaded; nothing else of `pipelines` is there. An
input row is one query; its columns are files in base64: `query` a photograph, `supports` the photographs that show the
class, `masks` their masks, in the same order. A row of the answer has `mask`, a PNG of the query's size in base64, with
255 on the class, and `score`, as fsdino.Predictor's.
"""

import base64
import hashlib
import io
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

KEPT_CLASSES = 64


class FewShotModel(PythonModel):
    """fsdino.Predictor behind MLflow's interface; recent classes are cached."""

    def load_context(self, context: Any) -> None:
        """Load encoder and segmenter."""
        import torch

        from fsdino import Predictor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = context.artifacts.get("encoder_weights")
        self.predictor = Predictor.load(context.artifacts["checkpoint"], device=device, encoder_weights=weights)
        self.classes: OrderedDict[str, Any] = OrderedDict()
        self.lock = threading.Lock()  # a server calls from several threads

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each query."""
        with self.lock:
            rows = [self._row(row.query, list(row.supports), list(row.masks)) for row in model_input.itertuples()]
        return pd.DataFrame(rows, columns=["mask", "score"])

    def _row(self, query: str, supports: list[str], masks: list[str]) -> tuple[str, float]:
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            encoding = self._encoding(supports, masks, folder)
            self.predictor.set_image(_file(query, folder, "query"))
        found = self.predictor.segment([encoding])
        answer = io.BytesIO()
        Image.fromarray(found.masks[0].astype("uint8") * 255).save(answer, "PNG")
        return base64.b64encode(answer.getvalue()).decode(), float(found.scores[0])

    def _encoding(self, supports: list[str], masks: list[str], folder: str) -> Any:
        key = hashlib.sha256("\n".join([*supports, "", *masks]).encode()).hexdigest()
        if key not in self.classes:
            images = [_file(data, folder, f"support-{n}") for n, data in enumerate(supports, start=1)]
            drawn = [_file(data, folder, f"mask-{n}") for n, data in enumerate(masks, start=1)]
            self.classes[key] = self.predictor.register(images, drawn)
            if len(self.classes) > KEPT_CLASSES:
                self.classes.popitem(last=False)
        self.classes.move_to_end(key)
        return self.classes[key]


def _file(encoded: str, folder: str, name: str) -> Path:
    """A file that was sent, under the name by which an error calls it."""
    path = Path(folder) / name
    path.write_bytes(base64.b64decode(encoded))
    return path


set_model(FewShotModel())
