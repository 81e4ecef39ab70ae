"""The whole way with the tiny recipe, by the real commands, on a real Ray and a real MLflow database."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from feature_store import FeatureStore, tools
from fsdino.encoder import build_encoder
from fsdino.preprocess import read_image, resize_square, to_input
from fsdino.segmenter import Segmenter
from pipelines import tracking
from tests.conftest import ROOT, command, result_of

FOLD = 1


@pytest.fixture(scope="module")
def places(tmp_path_factory, shapes_root):
    base = tmp_path_factory.mktemp("run")
    return {
        "--recipe": "tiny",
        "--data": shapes_root,
        "--store": base / "stores",
        "--out": base / "runs",
        "--tracking-uri": f"sqlite:///{base / 'mlflow.db'}",
    }


def flags(places, *names):
    chosen = places if not names else {n: places[n] for n in names}
    return [part for pair in chosen.items() for part in pair]


@pytest.fixture(scope="module")
def whole_run(places):
    """Every command once; title to result."""
    extracting, everywhere = flags(places), flags(places)
    fold = ["--fold", FOLD]
    two = ["--workers", 2, "--worker-cpus", 0.5]
    results = {
        "teacher": result_of(command("extract_teacher", *extracting)),
        "features": result_of(command("extract_features", *extracting, "--coarse-res", 28)),
        "distill": result_of(command("distill", *everywhere, *two)),
        "bake": result_of(command("bake_embeddings", *everywhere)),
        "4d": result_of(command("train_episodic", *everywhere, *fold)),
        "compact": result_of(command("train_episodic", *everywhere, *fold, "--variant", "compact", *two)),
    }
    for method in ("prototype", "nearest"):
        results[f"score {method}"] = result_of(command("evaluate", *everywhere, *fold, "--method", method))
    for variant in ("compact", "4d"):
        results[f"score {variant}"] = result_of(command("evaluate", *everywhere, *fold, "--variant", variant))
    return results


def test_every_step_of_the_way_ends_in_its_result(whole_run, shapes_root):
    assert whole_run["teacher"]["samples"] == whole_run["teacher"]["computed"] == 120
    assert whole_run["features"]["samples"] == whole_run["features"]["computed"] == (120 * 2 + 40) + 120
    assert [stage["res_px"] for stage in whole_run["distill"]["stages"]] == [28, 70]
    assert whole_run["4d"]["steps"] == 10 and whole_run["4d"]["loss"] > 0
    for method in ("prototype", "nearest", "compact", "4d"):
        score = whole_run[f"score {method}"]
        keys = "dataset protocol fold shots episodes seed variant miou fb_iou per_class"
        assert list(score) == keys.split()
        assert (score["dataset"], score["protocol"], score["variant"]) == ("shapes", "pfenet", method)
        assert 0 <= score["miou"] <= 1 and np.isclose(
            score["miou"], np.mean(list(score["per_class"].values())), atol=1e-5
        )


def test_stored_features_are_those_of_the_encoder(whole_run, places):
    store = FeatureStore(whole_run["features"]["stores"][1], expect={"feature": "late"})
    encoder = build_encoder("tiny_vit")
    sample = store.samples[0]
    x = to_input(resize_square(read_image(sample.source), 70)[None], encoder.mean, encoder.std)
    with torch.inference_mode():
        expected = encoder(x).late[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(store.read([0])[0], expected, atol=2e-3, rtol=2e-3)


def test_distillation_lowers_the_error_at_every_resolution(whole_run, places):
    client = tracking.MlflowClient(places["--tracking-uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    for stage in whole_run["distill"]["stages"]:
        res = stage["res_px"]
        curve = [m.value for m in client.get_metric_history(run.info.run_id, f"mse_{res}px")]
        assert len(curve) == stage["steps"] and np.mean(curve[-5:]) < np.mean(curve[:5])
        assert run.data.metrics[f"val_mse_{res}px"] == pytest.approx(stage["val_mse"])
        assert run.data.metrics[f"ridge_r2_{res}px"] == pytest.approx(stage["ridge_r2"])


def test_the_ridge_regression_of_a_stage_is_the_least_squares_fit_of_its_stores(whole_run, places):
    early = FeatureStore(f"{places['--store']}/shapes/early@28")
    teacher = FeatureStore(f"{places['--store']}/shapes/teacher@70")
    ids = [s.sample_id for s in teacher.samples]
    order = np.random.default_rng([0]).permutation(len(ids))
    held_out, trained = order[:6], order[6:]

    def pairs(chosen):
        names, views = [ids[i] for i in chosen], [0] * len(chosen)
        x, y = early.rows(names, views), teacher.rows(names, views).astype(np.float64)
        y = F.interpolate(torch.from_numpy(y).movedim(-1, 1), size=x.shape[1:3], mode="area").movedim(1, -1).numpy()
        x, y = x.reshape(-1, x.shape[-1]).astype(np.float64), y.reshape(-1, y.shape[-1])
        return np.hstack([x, np.ones((len(x), 1))]), y

    x, y = pairs(trained)
    x_held, y_held = pairs(held_out)
    found = []
    for penalty in (1e-6, 1e-4, 1e-2, 1.0):
        strength = penalty * (x[:, :-1] ** 2).sum(0).mean() * np.diag([*[1] * (x.shape[1] - 1), 0])
        rest = x_held @ np.linalg.solve(x.T @ x + strength, x.T @ y) - y_held
        found.append(1 - (rest**2).mean() / y_held.var(0).mean())
    assert whole_run["distill"]["stages"][0]["ridge_r2"] == pytest.approx(max(found), abs=1e-4)


def test_the_adapter_in_the_checkpoint_is_the_distilled_one(whole_run):
    segmenter, record = Segmenter.load(whole_run["4d"]["checkpoint"])
    store = FeatureStore(whole_run["bake"]["stores"][0], expect={"feature": "embedding"})
    early = FeatureStore(whole_run["features"]["stores"][0])
    with torch.inference_mode():
        baked = segmenter.embed(torch.from_numpy(early.read([5])).movedim(-1, 1).float())[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(store.read([5])[0], baked, atol=2e-3, rtol=2e-3)
    assert record["fold"] == FOLD


def test_mlflow_holds_settings_curves_fingerprints_pictures_and_the_model(whole_run, places):
    uri = places["--tracking-uri"]
    client = tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name("train").experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert set(runs) >= {f"fold{FOLD}-4d", f"fold{FOLD}-compact"}
    run = runs[f"fold{FOLD}-4d"]
    assert run.info.status == "FINISHED"
    assert run.data.params["variant"] == "4d" and run.data.params["lr"] == "0.001"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 11))
    assert "'feature': 'late'" in run.data.tags["store.late"] and "commit" in run.data.tags
    artifacts = {a.path for folder in ("panels", "segmenter") for a in client.list_artifacts(run.info.run_id, folder)}
    assert artifacts == {"panels/training.png", "segmenter/segmenter.json", "segmenter/segmenter.safetensors"}
    (distilled,) = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    assert [a.path for a in client.list_artifacts(distilled.info.run_id, "panels")] == ["panels/embeddings.png"]
    extracted = client.search_runs([client.get_experiment_by_name("extract").experiment_id])
    assert {"teacher@128", "early@70+late@70+early@28", "embedding@70"} <= {r.info.run_name for r in extracted}
    tested = client.search_runs([client.get_experiment_by_name("evaluate").experiment_id])
    logged = {r.data.params["method"]: r.data.metrics["miou"] for r in tested}
    assert logged == {
        m: pytest.approx(whole_run[f"score {m}"]["miou"]) for m in ("prototype", "nearest", "compact", "4d")
    }


def test_a_finished_command_only_reports_when_it_is_run_again(whole_run, places):
    again = result_of(command("extract_teacher", *flags(places)))
    assert again["computed"] == 0 and again["samples"] == 120
    assert result_of(command("train_episodic", *flags(places), "--fold", FOLD))["loss"] == whole_run["4d"]["loss"]


def test_predict_writes_a_mask_of_each_photographs_own_size(whole_run, shapes_root, tmp_path):
    support = shapes_root / "JPEGImages" / "shapes_000000.jpg"
    label = shapes_root / "SegmentationClassAug" / "shapes_000000.png"
    wide = tmp_path / "wide.jpg"
    Image.open(shapes_root / "JPEGImages" / "shapes_000001.jpg").resize((211, 97)).save(wide)
    where = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", support, "--mask", label]
    done = result_of(command("predict", *where, "--query", wide, support, "--out", tmp_path / "masks"))
    with Image.open(done["masks"][0]["mask"]) as mask:
        assert mask.size == (211, 97) and set(np.unique(np.array(mask))) <= {0, 255}
    assert Path(done["panel"]).exists() and len(done["masks"]) == 2


def test_predict_agrees_with_the_segmenter_called_by_hand(whole_run, shapes_root, tmp_path):
    support = shapes_root / "JPEGImages" / "shapes_000004.jpg"
    label = shapes_root / "SegmentationClassAug" / "shapes_000004.png"
    where = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", support, "--mask", label]
    done = result_of(command("predict", *where, "--query", support, "--out", tmp_path / "masks"))
    segmenter, _ = Segmenter.load(whole_run["4d"]["checkpoint"])
    encoder = build_encoder("tiny_vit")
    with torch.inference_mode():
        features = encoder(to_input(resize_square(read_image(support), 70)[None], encoder.mean, encoder.std))
        mask = torch.from_numpy((np.array(Image.open(label)) > 0).astype(np.float32))
        known = segmenter.encode_support(features.late[None], mask[None, None])
        logits = segmenter.segment(features.late, segmenter.embed(features.early), known).mask_logits
        expected = torch.nn.functional.interpolate(logits, size=(224, 224), mode="bilinear")[0, 0] > 0
    assert np.array_equal(np.array(Image.open(done["masks"][0]["mask"])) > 0, expected.numpy())


# Ray's processes outlive a killed driver for a while, so a whole session of processes is killed, as a lost node would.
def start(name, *arguments):
    line = [sys.executable, "-m", f"pipelines.{name}", *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 20):
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def test_training_goes_on_after_kill_9_and_ends_at_the_undisturbed_loss(whole_run, places):
    longer = ["--fold", FOLD, "--steps", 60]
    undisturbed = result_of(command("train_episodic", *flags(places), *longer, "--name", "undisturbed"))
    folder = Path(places["--out"]) / "shapes" / "killed"
    process = start("train_episodic", *flags(places), *longer, "--name", "killed")
    # Ray resumes from its snapshot, which follows the first checkpoint and precedes the second.
    twice = wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process)
    assert twice, "it ended before it could be killed"
    kill(process)
    assert not (folder / "final").exists()
    resumed = result_of(command("train_episodic", *flags(places), *longer, "--name", "killed"))
    assert resumed["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6)
    one, other = (Segmenter.load(r["checkpoint"])[0].state_dict() for r in (undisturbed, resumed))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)
    client = tracking.MlflowClient(places["--tracking-uri"])
    runs = client.search_runs([client.get_experiment_by_name("train").experiment_id], "run_name = 'killed'")
    (run,) = [r for r in runs if r.data.tags.get("mlflow.runName") == "killed"]
    steps = Counter(m.step for m in client.get_metric_history(run.info.run_id, "loss"))
    assert set(steps) == set(range(1, 61))
    assert steps[1] == 1, "step 1 was logged twice: the run started over"
    assert run.info.status == "FINISHED"


def test_a_run_with_other_settings_is_not_overwritten(whole_run, places):
    done = command("train_episodic", *flags(places), "--fold", FOLD, "--lr", 0.5, check=False)
    assert done.returncode == 2
    assert "a run with other settings is there (lr: expected 0.5, got 0.001)" in done.stderr.splitlines()[-1]


def test_mistakes_end_with_code_2_and_one_line(whole_run, places, shapes_root, tmp_path):
    """Each in the real command; the quick ones of the same kind are in test_cli.py."""
    done = command("evaluate", *flags(places), "--fold", 2, "--checkpoint", whole_run["4d"]["checkpoint"], check=False)
    assert done.returncode == 2 and "trained for fold 1" in done.stderr.splitlines()[-1]
    record = json.loads((Path(whole_run["4d"]["checkpoint"]) / "segmenter.json").read_text())
    assert record["commit"]


@pytest.mark.slow
def test_distillation_goes_on_after_kill_9_and_ends_at_the_undisturbed_adapter(whole_run, places, tmp_path):
    one, other = ({**places, "--out": tmp_path / name} for name in ("undisturbed", "killed"))
    longer = ["--distill-epochs", 4]
    undisturbed = result_of(command("distill", *flags(one), *longer))
    folder = tmp_path / "killed" / "shapes" / "distill"
    process = start("distill", *flags(other), *longer)
    assert wait_for(lambda: len(list(folder.glob("checkpoint_*/state.pt"))) >= 2, process)
    kill(process)
    resumed = result_of(command("distill", *flags(other), *longer))
    for a, b in zip(undisturbed["stages"], resumed["stages"], strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-5)


@pytest.mark.slow
def test_an_adapter_trained_along_needs_no_embeddings_and_is_scored_under_its_own_name(whole_run, places):
    arguments = [*flags(places), "--fold", FOLD, "--adapter", "joint"]
    trained = result_of(command("train_episodic", *arguments, "--no-semantic-prompt"))
    assert trained["checkpoint"] == f"{places['--out']}/shapes/fold{FOLD}-4d-no-svp-joint/final"
    segmenter, _ = Segmenter.load(trained["checkpoint"])
    frozen, _ = Segmenter.load(whole_run["4d"]["checkpoint"])
    assert trained["trained_parameters"] == whole_run["4d"]["trained_parameters"] + sum(
        p.numel() for p in segmenter.adapter.parameters()
    ) - sum(p.numel() for p in frozen.prompt.parameters())
    score = result_of(command("evaluate", *arguments, "--no-semantic-prompt"))
    assert score["variant"] == "4d-no-svp-joint"
    done = command("bake_embeddings", *flags(places), "--adapter", "joint", check=False)
    assert done.returncode == 2 and "nothing is to be baked" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_two_workers_train_what_one_does(whole_run, places, tmp_path):
    """The shares of a batch are equal, so the mean of their gradients is the batch's."""
    alone = result_of(command("distill", *flags({**places, "--out": tmp_path / "one"})))
    for a, b in zip(alone["stages"], whole_run["distill"]["stages"], strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-3)


def test_relative_paths_mean_the_same_place_to_the_workers(whole_run, places):
    """Ray's workers have working folders of their own."""
    relative = {k: os.path.relpath(v, ROOT) if k in ("--data", "--store", "--out") else v for k, v in places.items()}
    result = result_of(command("train_episodic", *flags(relative), "--fold", FOLD, "--steps", 2, "--name", "relative"))
    assert (Path(places["--out"]) / "shapes" / "relative" / "final" / "segmenter.json").exists()
    assert result["checkpoint"] == str(Path(places["--out"]) / "shapes" / "relative" / "final")


def test_a_cluster_too_small_is_said_at_once(whole_run, places):
    done = command(
        "train_episodic",
        *flags(places),
        "--fold",
        FOLD,
        "--name",
        "big",
        "--workers",
        4,
        "--worker-cpus",
        64,
        check=False,
    )
    assert done.returncode == 2
    assert "4 workers with 64 CPU each: expected a cluster with 256 CPU" in done.stderr.splitlines()[-1]


def test_a_report_holds_every_method(whole_run, places):
    done = command("report", *flags(places, "--recipe", "--tracking-uri"), "--dataset", "shapes", "--episodes", 20)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert set(rows[1:]) == {"prototype", "nearest", "compact", "4d"}
    assert result_of(done)["methods"]["4d"][str(FOLD)]["miou"] == pytest.approx(whole_run["score 4d"]["miou"], abs=1e-4)


@pytest.mark.slow
def test_extraction_and_training_on_s3_equal_those_on_disk(whole_run, places, s3_endpoint, tmp_path):
    remote = f"s3://features/{uuid.uuid4().hex}/stores"
    elsewhere = {**places, "--store": remote}
    command("extract_features", *flags(elsewhere), "--coarse-res", 28)
    for local in tools.find(str(places["--store"])):
        url = f"{remote}/{Path(local).relative_to(places['--store'])}"
        if "early" in url or "late" in url:
            assert tools.difference(local, url)["equal"]
        else:
            tools.copy(local, url)
    cached = ["--cache", tmp_path / "cache", "--cache-gb", 1]
    arguments = [*flags(elsewhere), "--fold", FOLD, "--name", "from-s3", *cached]
    result = result_of(command("train_episodic", *arguments))
    assert result["loss"] == whole_run["4d"]["loss"]
    assert len([p for p in (tmp_path / "cache").glob("*/*") if p.name.isdigit()]) > 10
