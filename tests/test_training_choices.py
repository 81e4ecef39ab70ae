"""Validation on classes that are held out, an adapter from plain photographs, and models across data sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store import FeatureStore
from fsdino.adapter import BottleneckAdapter
from fsdino.data.dataset import open_dataset
from fsdino.data.protocols import HDMNET
from fsdino.errors import UserError
from fsdino.segmenter import Segmenter
from pipelines import plan, sequence, tracking
from pipelines.recipes import tiny_recipe
from tests.conftest import FOLD, flags, run


@pytest.fixture(scope="module")
def validated(whole_run, places):
    validation = ["--select-on", "base", "--validation-classes", 2, "--validate-every", 4, "--validation-episodes", 12]
    return run("train_episodic", *flags(places), "--fold", FOLD, *validation)


@pytest.mark.slow
def test_classes_held_out_for_validation_never_train(validated, places):
    _, record = Segmenter.load(validated["checkpoint"])
    dataset = open_dataset(str(places["--data"]))
    held_out = [dataset.class_names.index(name) + 1 for name in record["held_out_classes"]]
    assert len(held_out) == 2 and not set(held_out) & set(dataset.novel(FOLD))
    pixels = dataset.class_pixels("train")
    train = HDMNET.training_images(dataset, FOLD, held_out)
    check = HDMNET.validation_images(dataset, FOLD, held_out)
    assert train and check and not set(train) & set(check) and record["base_images"] == len(train)
    assert not any(set(held_out) & pixels[i].keys() for i in train)
    assert all(set(held_out) & pixels[i].keys() and not set(dataset.novel(FOLD)) & pixels[i].keys() for i in check)


@pytest.mark.slow
def test_the_best_weights_are_kept_beside_the_last_and_say_what_chose_them(validated, places, whole_run):
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    name = Path(validated["checkpoint"]).parent.name
    (found,) = client.search_runs(
        [client.get_experiment_by_name("train/shapes").experiment_id], f"tags.mlflow.runName = '{name}'"
    )
    curve = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "val_miou")}
    assert sorted(curve) == [4, 8, 10] and validated["best_val_miou"] == pytest.approx(max(curve.values()), abs=1e-6)
    assert curve[validated["best_step"]] == max(curve.values())
    record = json.loads((Path(validated["best"]) / "segmenter.json").read_text())
    assert record["selected"] == {"on": "base", "step": validated["best_step"], "miou": validated["best_val_miou"]}
    score = run("evaluate", *flags(places), "--fold", FOLD, "--checkpoint", validated["best"])
    assert score["variant"] == "4d-best-on-base"
    assert {f.path for f in client.list_artifacts(found.info.run_id)} >= {"segmenter", "best"}


@pytest.mark.slow
def test_choosing_on_the_test_classes_is_named(whole_run, places):
    novel = ["--select-on", "novel", "--validate-every", 10, "--validation-episodes", 4, "--steps", 2]
    trained = run("train_episodic", *flags(places), "--fold", FOLD, *novel)
    score = run("evaluate", *flags(places), "--fold", FOLD, "--checkpoint", trained["best"])
    assert score["variant"] == "4d-best-on-novel"
    too_many = ["--select-on", "base", "--validation-classes", 9]
    with pytest.raises(UserError, match="--validation-classes 9: expected fewer than the 9 base classes"):
        run("train_episodic", *flags(places), "--fold", FOLD, *too_many)


@pytest.fixture(scope="module")
def from_photographs(whole_run, places):
    """An adapter that was distilled on half of the data set's photographs, as plain ones."""
    chosen = ["--images", Path(str(places["--data"])) / "JPEGImages", "--share", 0.5]
    run("extract_teacher", *flags(places), *chosen)
    run("extract_features", *flags(places), *chosen, "--features", "early", "--coarse-res", 28)
    return run("distill", *flags(places), *chosen)["adapter"]


@pytest.mark.slow
def test_an_adapter_of_plain_photographs_bakes_any_data_set(from_photographs, places):
    _, record = BottleneckAdapter.load(from_photographs)
    assert record["images"] == 80 and record["dataset"].startswith("JPEGImages-")
    (url,) = run("bake_embeddings", *flags(places), "--adapter-checkpoint", from_photographs)["stores"]
    store = FeatureStore(url)
    assert store.fingerprint.weights == record["digest"] and len(store) == 280 and "/shapes/" in url


@pytest.mark.slow
def test_a_segmenters_own_adapter_bakes_what_the_adapter_it_came_from_does(whole_run, places, tmp_path):
    elsewhere = {**places, "--store": tmp_path / "stores"}
    run("extract_features", *flags(elsewhere), "--features", "early", "--splits", "val")
    (url,) = run("bake_embeddings", *flags(elsewhere), "--adapter-checkpoint", whole_run["4d"]["checkpoint"])["stores"]
    one, other = FeatureStore(url), FeatureStore(whole_run["bake"]["stores"][0])
    assert one.fingerprint == other.fingerprint
    image = one.samples[3].sample_id
    assert np.array_equal(one.rows([image], [0]), other.rows([image], [0]))


def settings(**changes):
    recipe = tiny_recipe()
    shared = {name: getattr(recipe, name) for name in vars(recipe)}
    return sequence.Study(recipe="tiny", **{**shared, **changes})


def titles(study):
    return [step.title for step in sequence.plan(sequence.asked(study))]


def test_a_study_of_a_table_runs_what_the_table_needs():
    of_two = titles(settings(table=2))
    for shots in (1, 5):
        for fold in range(4):
            for name in ("compact", "4d", "prototype"):
                assert f"score {name}, fold {fold}, {shots}-shot" in of_two
    of_four = titles(settings(table=4))
    assert sum(title.startswith("train ") for title in of_four) == 16
    assert {"train compact without semantic prompt, fold 3", "train 4d without distillation, fold 0"} <= set(of_four)
    of_three = titles(settings(table=3, fss="/fss", davis="/davis", folds=(1,)))
    assert of_three[-2:] == [
        "score matching, trained on fold 0, on FSS-1000",
        "score matching, trained on fold 0, on DAVIS-17",
    ]
    assert "score 4d, trained on fold 1, on DAVIS-17" in of_three and not any("1-shot" in t for t in of_three)
    with pytest.raises(UserError, match="--table 3: expected the folder of FSS-1000"):
        titles(settings(table=3))


def test_a_plan_counts_the_bytes_that_the_stores_then_have(whole_run, places, capsys):
    found = run("plan", *flags(places), "--encoder-rate", 10)
    sizes = {line["store"]: line for line in found["stores"]}
    for url in (*whole_run["features"]["stores"], *whole_run["teacher"]["stores"], *whole_run["bake"]["stores"]):
        store, name = FeatureStore(url), url.rsplit("/", 1)[1]
        sample = store.fingerprint.grid**2 * store.fingerprint.channels * np.dtype(store.fingerprint.dtype).itemsize
        assert (sizes[name]["samples"], sizes[name]["bytes"]) == (len(store), len(store) * sample)
    assert (
        found["hours"]["encoder"] == pytest.approx(400 / 10 / 3600, abs=0.01)
        and "| late@70 | 280 |" in capsys.readouterr().out
    )


def test_the_plan_of_1_percent_of_sa_1b_is_that_of_111854_images():
    found = run("plan", "--recipe", "paper", "--of", "sa1b", "--share", 0.01, "--teacher-rate", 10)
    teacher = next(line for line in found["stores"] if line["store"] == "teacher@1024")
    assert teacher == {"store": "teacher@1024", "samples": 111854, "bytes": 111854 * 64 * 64 * 256 * 2}
    assert found["hours"]["teacher"] == pytest.approx(3.11) and plan.PUBLISHED["voc"] == (5953, 1449)
