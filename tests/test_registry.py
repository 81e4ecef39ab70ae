"""Models in MLflow's registry: loaded, served and scored as their users do, without this project beside them."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fsdino import Predictor
from pipelines import registry, tracking
from pipelines.checkpoints import read_record
from pipelines.runs import About
from tests.conftest import FOLD, flags, run
from tests.servers import aws, environment, free_port, mlflow_server

MODEL = "models:/shapes-4d/latest"
LOADED_ALONE = """
import sys
sys.modules["pipelines"] = sys.modules["feature_store"] = None
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
answer = model.predict(pandas.read_json(sys.argv[3], orient="records"))
import fsdino
print(fsdino.__file__, answer["mask"][0])
"""


def encoded(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


@pytest.fixture
def asked(shapes_root, tmp_path):
    """A row that asks for a class, and paths of its support, mask and query."""
    images, labels = (sorted((shapes_root / folder).iterdir()) for folder in ("JPEGImages", "SegmentationClassAug"))
    label = np.array(Image.open(labels[4]))
    mask = tmp_path / "mask.png"
    Image.fromarray(((label == np.unique(label)[1]) * 255).astype(np.uint8)).save(mask)
    row = {"query": encoded(images[5]), "supports": [encoded(images[4])], "masks": [encoded(mask)]}
    return row, images[4], mask, images[5]


def expected_mask(whole_run, asked):
    _, support, mask, query = asked
    predictor = Predictor.load(whole_run["4d"]["checkpoint"])
    predictor.set_image(query)
    return predictor.segment([predictor.register([support], [mask])])


def mask_of(answer):
    return np.array(Image.open(io.BytesIO(base64.b64decode(answer)))) > 0


@contextmanager
def tracked(uri):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of MLflow's loader
def test_the_registered_model_finds_what_the_predictor_finds(whole_run, places, asked):
    assert whole_run["4d"]["model"] == "shapes-4d/1"
    with tracked(str(places["--tracking-uri"])):
        answer = mlflow.pyfunc.load_model(MODEL).predict(pd.DataFrame([asked[0], asked[0]]))
    expected = expected_mask(whole_run, asked)
    assert len(answer) == 2 and np.array_equal(mask_of(answer["mask"][1]), expected.masks[0])
    assert answer["score"][0] == pytest.approx(expected.scores[0], abs=1e-6)


def test_it_loads_where_nothing_of_the_project_is(whole_run, places, asked, tmp_path):
    (tmp_path / "asked.json").write_text(json.dumps([asked[0]]))
    line = [sys.executable, "-c", LOADED_ALONE, str(places["--tracking-uri"]), MODEL, str(tmp_path / "asked.json")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    code, mask = done.stdout.split()
    assert "models/m-" in code and np.array_equal(mask_of(mask), expected_mask(whole_run, asked).masks[0])


def test_a_version_says_what_it_is_how_it_is_asked_and_what_it_scored(whole_run, places):
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    version = client.get_model_version("shapes-4d", "1")
    training = client.get_run(version.run_id)
    tags = version.tags
    assert (tags["dataset"], tags["fold"], tags["recipe"], tags["variant"]) == ("shapes", str(FOLD), "tiny", "4d")
    assert tags["commit"] == training.data.tags["mlflow.source.git.commit"]
    assert float(tags["miou shapes 1shot-hdmnet 20x1"]) == pytest.approx(whole_run["score 4d"]["miou"], abs=1e-4)
    artifacts = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    with tracked(str(places["--tracking-uri"])):
        info = mlflow.models.get_model_info(artifacts.removeprefix("file://"))
    assert info.signature.inputs.input_names() == ["query", "supports", "masks"]
    assert [m.model_id for m in training.outputs.model_outputs] == [version.source.removeprefix("models:/")]
    of_requirements = registry.requirements("tiny_vit")
    assert all("==" in line and "+" not in line for line in of_requirements) and len(of_requirements) > 10


def test_a_registry_that_does_not_answer_costs_a_note_and_a_rerun_registers(whole_run, places, capsys):
    checkpoint = whole_run["compact"]["checkpoint"]
    record = read_record(checkpoint, "segmenter")
    dead = f"http://127.0.0.1:{free_port()}"
    assert registry.register(dead, record["run_id"], checkpoint, record, "shapes-compact", "shapes") is None
    assert "a rerun registers it" in capsys.readouterr().err
    arguments = ["train_episodic", *flags(places), "--fold", FOLD, "--variant", "compact", "--model-name", "late"]
    assert run(*arguments)["model"] == "late/1" == run(*arguments)["model"]


@pytest.mark.slow
def test_a_served_model_answers(whole_run, places, asked, tmp_path):
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", MODEL, "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn by its name
    environ = os.environ | {"MLFLOW_TRACKING_URI": str(places["--tracking-uri"]), "PATH": path}
    server = subprocess.Popen([*line, "--env-manager", "local"], cwd=tmp_path, env=environ, start_new_session=True)
    try:
        answer = None
        body = json.dumps({"dataframe_records": [asked[0]]}).encode()
        for _ in range(120):
            time.sleep(1)
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
                )
                answer = json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
                break
            except OSError:
                continue
        assert answer and np.array_equal(mask_of(answer[0]["mask"]), expected_mask(whole_run, asked).masks[0])
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.mark.slow
def test_a_tracking_server_keeps_models_in_a_bucket(whole_run, tmp_path, asked, s3_endpoint):
    checkpoint, port = whole_run["4d"]["checkpoint"], free_port()
    record = read_record(checkpoint, "segmenter")
    with environment(MLFLOW_S3_ENDPOINT_URL=s3_endpoint, **aws(s3_endpoint)):
        with mlflow_server(tmp_path, port, "s3://features/models"):
            uri = f"http://127.0.0.1:{port}"
            with tracking.running(uri, About("train", "shapes", "remote", {})) as one:
                one.log(1, loss=1.0)
            assert registry.register(uri, one.run_id, checkpoint, record, "remote", "shapes") == "remote/1"
            with tracked(uri):
                answer = mlflow.pyfunc.load_model("models:/remote/1").predict(pd.DataFrame([asked[0]]))
    assert np.array_equal(mask_of(answer["mask"][0]), expected_mask(whole_run, asked).masks[0])
