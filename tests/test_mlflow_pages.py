"""MLflow's own pages in a real browser: what a researcher looks for is there."""

import re
import shutil
import subprocess

import pytest

from pipelines import tracking
from tests.conftest import FOLD
from tests.servers import free_port, mlflow_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def pages(whole_run, places, tmp_path_factory):
    """What a page says once its scripts have run, by its address behind the #."""
    folder, port = tmp_path_factory.mktemp("pages"), free_port()
    database = str(places["--tracking-uri"]).removeprefix("sqlite:///")
    shutil.copy(database, folder / "server.db")

    def text(address):
        line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000"]
        line += ["--window-size=1600,2400", "--dump-dom", f"http://127.0.0.1:{port}/#{address}"]
        page = subprocess.run(line, capture_output=True, text=True, timeout=180).stdout
        page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))

    with mlflow_server(folder, port):
        yield text


@pytest.fixture(scope="module")
def training(whole_run, places):
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    experiment = client.get_experiment_by_name("train/shapes").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = 'fold{FOLD}-4d'")
    return f"/experiments/{experiment}/runs", run.info.run_id


def test_experiments_say_what_they_are_and_open_as_model_training(pages, training):
    listed = pages("/experiments")
    for pipeline in ("extract", "distill", "train", "evaluate"):
        assert f"{pipeline}/shapes" in listed
    assert "a run for each fold and model" in listed
    assert "Training runs" in pages(training[0]) and f"fold{FOLD}-4d" in pages(training[0])


def test_a_run_shows_its_data_origin_model_and_parameters(pages, training):
    page = pages(f"{training[0]}/{training[1]}")
    for wanted in ("About this run", "model.variant", "episodic.lr", "shapes-4d v1", "command", "seconds_per_step"):
        assert wanted in page, wanted
    assert re.search(r"Datasets shapes \([0-9a-f]{8}\) training \+2", page), "the list and two stores"


def test_a_run_shows_its_curves_and_pictures(pages, training):
    # The charts themselves are drawn after what a headless browser waits for.
    assert re.search(r"Model metrics \([5-9]\)", pages(f"{training[0]}/{training[1]}/model-metrics"))
    assert re.search(r"System metrics \(\d+\)", pages(f"{training[0]}/{training[1]}/system-metrics"))
    assert "training episodes" in pages(f"{training[0]}/{training[1]}/artifacts/images")


def test_the_trained_model_is_under_models_with_its_score(pages):
    assert "shapes-4d" in pages("/models")
    version = pages("/models/shapes-4d/versions/1")
    assert "miou shapes 1shot-hdmnet 20x1" in version and "recipe tiny" in version
