"""The whole way with the tiny recipe, by the real commands, on a real Ray and a real MLflow database.

Commands run in this process, on one Ray; those that are killed are in test_kills.py.
"""

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO

from feature_store import FeatureStore, StoreError, tools
from fsdino.encoder import build_encoder, to_input
from fsdino.errors import UserError
from fsdino.preprocess import read_image, resize_square
from fsdino.segmenter import Segmenter
from pipelines import tracking
from tests.conftest import FOLD, TRAINED, command, flags, result_of, run, stop_ray


def test_every_step_of_the_way_ends_in_its_result(whole_run, places):
    assert whole_run["teacher"]["samples"] == whole_run["teacher"]["computed"] == 120
    assert whole_run["features"]["samples"] == whole_run["features"]["computed"] == (120 * 2 + 40) + 120
    assert [stage["res_px"] for stage in whole_run["distill"]["stages"]] == [28, 70]
    assert whole_run["4d"]["steps"] == 10 and whole_run["4d"]["loss"] > 0
    folder = Path(places["--out"]) / TRAINED
    adapters = Path(places["--out"]) / "adapters" / "tiny_vit@70"
    assert whole_run["distill"]["adapter"] == str(adapters / "tiny_sam-on-shapes" / "final")
    assert whole_run["4d"]["checkpoint"] == str(folder / f"fold{FOLD}-4d" / "final")
    for method in ("prototype", "nearest", "compact", "4d"):
        score = whole_run[f"score {method}"]
        about = "dataset protocol rules folds fold shots fusion episodes absent memory lists seed variant trained_on"
        assert set(score) == {*about.split(), "left_out", "miou", "fb_iou", "boundary_iou", "per_class"}
        assert score["rules"]["min_pixels"] == 2048 and score["left_out"] == {"quarantined": 0, "bad_labels": 0}
        assert (score["dataset"], score["protocol"], score["variant"]) == ("shapes", "hdmnet", method)
        assert score["folds"] == "4 blocks"


def test_stores_lie_by_data_set_model_feature_and_resolution(whole_run, places):
    adapter = json.loads((Path(whole_run["distill"]["adapter"]) / "adapter.json").read_text())
    lie = {str(Path(url).relative_to(places["--store"])) for url in tools.find(str(places["--store"]))}
    assert lie == {
        "shapes/tiny_sam/teacher@128",
        "shapes/tiny_vit/early@28",
        "shapes/tiny_vit/early@70",
        "shapes/tiny_vit/late@70",
        f"shapes/tiny_vit-adapter-{adapter['digest'][:8]}/embedding@70",
    }


def test_an_embedding_store_says_what_it_was_baked_from(whole_run):
    embedding = FeatureStore(whole_run["bake"]["stores"][0]).fingerprint
    early = FeatureStore(whole_run["features"]["stores"][0]).fingerprint
    assert embedding.made_from == early and (early.layer, early.norm) == ("block2", "none")
    late = FeatureStore(whole_run["features"]["stores"][1]).fingerprint
    assert (late.layer, late.norm, late.made_from) == ("block3", "final", None)


def recounted(folder: Path, labels: Path, classes: dict[str, int]) -> dict[str, float]:
    """mIoU and FB-IoU from the masks that an evaluation saved, with Python's own sets of pixels."""
    sums = {class_id: [0, 0] for class_id in classes.values()}
    both = [[0, 0], [0, 0]]
    for path in sorted(folder.iterdir()):
        _, class_id, query = path.stem.split("_", 2)
        label = np.array(Image.open(labels / f"{query}.png")).ravel().tolist()
        mask = np.array(Image.open(path)).ravel().tolist()
        seen = [(m > 0, truth == int(class_id)) for m, truth in zip(mask, label, strict=True) if truth != 255]
        for side in (0, 1):
            intersection = sum(m == side and t == side for m, t in seen)
            union = sum(m == side or t == side for m, t in seen)
            both[side][0] += intersection
            both[side][1] += union
            if side:
                sums[int(class_id)][0] += intersection
                sums[int(class_id)][1] += union
    ious = [i / u for i, u in sums.values() if u]
    return {"miou": sum(ious) / len(ious), "fb_iou": sum(i / u for i, u in both) / 2}


def test_scores_are_those_of_the_masks_counted_anew(whole_run, places, shapes_root, tmp_path):
    saved = run("evaluate", *flags(places), "--fold", FOLD, "--masks", tmp_path / "masks")
    assert saved["miou"] == whole_run["score 4d"]["miou"] and len(list((tmp_path / "masks").iterdir())) == 20
    names = (shapes_root / "classes.txt").read_text().split()
    classes = {name: names.index(name) + 1 for name in saved["per_class"]}
    assert set(classes.values()) <= {4, 5, 6}
    expected = recounted(tmp_path / "masks", shapes_root / "SegmentationClassAug", classes)
    assert saved["miou"] == pytest.approx(expected["miou"], abs=1e-12)
    assert saved["fb_iou"] == pytest.approx(expected["fb_iou"], abs=1e-12)
    assert saved["miou"] == pytest.approx(np.mean(list(saved["per_class"].values())), abs=1e-6)


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
    (run,) = client.search_runs([client.get_experiment_by_name("distill/shapes").experiment_id])
    for stage in whole_run["distill"]["stages"]:
        res = stage["res_px"]
        curve = [m.value for m in client.get_metric_history(run.info.run_id, f"mse_{res}px")]
        assert len(curve) == stage["steps"] and np.mean(curve[-5:]) < np.mean(curve[:5])
        assert run.data.metrics[f"val_mse_{res}px"] == pytest.approx(stage["val_mse"])
        assert run.data.metrics[f"ridge_r2_{res}px"] == pytest.approx(stage["ridge_r2"])


def test_the_ridge_regression_of_a_stage_is_the_least_squares_fit_of_its_stores(whole_run, places):
    early = FeatureStore(whole_run["features"]["stores"][2])
    teacher = FeatureStore(whole_run["teacher"]["stores"][0])
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
    experiment = client.get_experiment_by_name("train/shapes").experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert set(runs) >= {f"fold{FOLD}-4d", f"fold{FOLD}-compact"}
    run = runs[f"fold{FOLD}-4d"]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.variant"] == "4d" and run.data.params["episodic.lr"] == "0.001"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 11))
    assert "episodic.epochs" not in run.data.params  # of a training whose number of steps was given
    tags, inputs = run.data.tags, {i.dataset.name: i for i in run.inputs.dataset_inputs}
    assert tags["mlflow.source.git.commit"] and tags["mlflow.user"] and tags["mlflow.source.name"]
    assert set(inputs) == {"shapes", "late@70", "embedding@70"}
    late = inputs["late@70"].dataset
    assert json.loads(late.source)["uri"] == whole_run["features"]["stores"][1]
    assert json.loads(late.profile)["layer"] == "block3" and inputs["shapes"].tags[0].value == "training"
    series = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    assert len(series) == 10 and all("step" in path for path in series)
    assert {m.step for m in client.get_metric_history(run.info.run_id, "system/system_memory_usage_percentage")}
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "segmenter")}
    assert artifacts == {"segmenter/segmenter.json", "segmenter/segmenter.safetensors"}
    (distilled,) = client.search_runs([client.get_experiment_by_name("distill/shapes").experiment_id])
    assert [a.path for a in client.list_artifacts(distilled.info.run_id, "panels")] == ["panels/embeddings.png"]
    extracted = client.search_runs([client.get_experiment_by_name("extract/shapes").experiment_id])
    assert {"teacher@128", "early@70+late@70+early@28", "embedding@70"} <= {r.info.run_name for r in extracted}
    tested = client.search_runs([client.get_experiment_by_name("evaluate/shapes").experiment_id])
    (of_4d,) = [r for r in tested if r.info.run_name == f"fold{FOLD}-4d-1shot-hdmnet-seed0"][-1:]
    assert (
        of_4d.data.tags["trained_by"] == run.info.run_id and run.info.run_id in of_4d.data.tags["mlflow.note.content"]
    )
    logged = {r.data.params["method"]: r.data.metrics.get("miou") for r in tested}  # of each method the first run
    for method in ("prototype", "nearest", "compact", "4d"):
        assert logged[method] == pytest.approx(whole_run[f"score {method}"]["miou"])


def test_a_finished_command_only_reports_when_it_is_run_again(whole_run, places):
    again = run("extract_teacher", *flags(places))
    assert again["computed"] == 0 and again["samples"] == 120
    assert run("distill", *flags(places), "--workers", 2, "--worker-cpus", 0.5) == whole_run["distill"]
    assert run("train_episodic", *flags(places), "--fold", FOLD) == whole_run["4d"]
    assert run("evaluate", *flags(places), "--fold", FOLD) == whole_run["score 4d"]


def test_an_evaluation_of_anything_else_is_another(whole_run, places):
    first = json.loads(next((Path(places["--out"]) / TRAINED / "scores").glob(f"fold{FOLD}-4d-*.json")).read_text())
    assert first["identity"]["model"]["variant"] == "4d" and first["identity"]["trained"]["recipe"] == "tiny"
    other = run("evaluate", *flags(places), "--fold", FOLD, "--test-seed", 7)
    assert other["seed"] == 7 and other["miou"] != whole_run["score 4d"]["miou"]


def test_predict_writes_a_mask_of_each_photographs_own_size(whole_run, shapes_root, tmp_path):
    support = shapes_root / "JPEGImages" / "shapes_000000.jpg"
    label = shapes_root / "SegmentationClassAug" / "shapes_000000.png"
    wide = tmp_path / "wide.jpg"
    Image.open(shapes_root / "JPEGImages" / "shapes_000001.jpg").resize((211, 97)).save(wide)
    value = int(np.unique(np.array(Image.open(label)))[1])
    where = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", support, "--mask", label]
    where += ["--mask-value", value]
    done = run("predict", *where, "--query", wide, support, "--out", tmp_path / "masks")
    with Image.open(done["masks"][0]["mask"]) as mask:
        assert mask.size == (211, 97) and set(np.unique(np.array(mask))) <= {0, 255}
    assert Path(done["panel"]).exists() and len(done["masks"]) == 2


def test_predict_finds_several_classes_of_examples_and_files_in_a_folder(whole_run, shapes_root, tmp_path):
    checkpoint, examples = ["--checkpoint", whole_run["4d"]["checkpoint"]], []
    for number, name in ((0, "disc"), (4, "bar")):
        photograph = shapes_root / "JPEGImages" / f"shapes_{number:06d}.jpg"
        label = np.array(Image.open(shapes_root / "SegmentationClassAug" / f"shapes_{number:06d}.png"))
        Image.fromarray((label == np.unique(label)[1]).astype(np.uint8) * 255).save(tmp_path / f"{name}.png")
        examples.append((name, photograph, tmp_path / f"{name}.png"))
    (disc, *of_disc), (bar, *of_bar) = examples
    file = tmp_path / "bar.class"
    made = run("register", *checkpoint, "--name", bar, "--support", of_bar[0], "--mask", of_bar[1], "--out", file)
    assert made == {"class": str(file), "name": "bar", "shots": 1}
    twice = ["--support", of_bar[0], of_bar[0], "--mask", of_bar[1], of_bar[1], "--rank"]
    ranks = run("register", *checkpoint, "--name", bar, *twice, "--out", tmp_path / "two.class")["ranks"]
    assert [rank["helps"] for rank in ranks] == [None, None] and ranks[0]["found"] == ranks[1]["found"]
    with pytest.raises(UserError, match="--rank: expected at least two photographs to compare, got 1"):
        run("register", *checkpoint, "--name", bar, *twice[:2], *twice[3:5], "--rank", "--out", file)
    queries = tmp_path / "photos" / "inner"
    queries.mkdir(parents=True)
    for number in (1, 2, 3):
        shutil.copy(shapes_root / "JPEGImages" / f"shapes_{number:06d}.jpg", queries)
    asked = ["--class", disc, f"{of_disc[0]}={of_disc[1]}", "--class", file, "--query", tmp_path / "photos"]
    formats = ["--format", "mask", "labels", "overlay", "coco", "yolo", "--batch", 2]
    done = run("predict", *checkpoint, *asked, *formats, "--out", tmp_path / "out")
    lines = [json.loads(line) for line in Path(done["results"]).read_text().splitlines()]
    assert [Path(line["query"]).stem for line in lines] == [f"shapes_{n:06d}" for n in (1, 2, 3)]
    assert all([c["name"] for c in line["classes"]] == ["disc", "bar"] for line in lines)
    assert all(Path(file).exists() for line in lines for file in line["files"]) and len(lines[0]["files"]) == 5
    masks = {line["query"]: np.array(Image.open(line["files"][0])) > 0 for line in lines}
    alone = ["--support", of_disc[0], "--mask", of_disc[1], "--query", *masks]
    single = run("predict", *checkpoint, *alone, "--out", tmp_path / "alone")
    for one in single["masks"]:
        assert np.array_equal(np.array(Image.open(one["mask"])) > 0, masks[one["query"]])
    read = COCO(str(tmp_path / "out" / "annotations.json"))
    assert [i["file_name"] for i in read.loadImgs(read.getImgIds())] == list(masks)
    for wrong, said in (
        (["--class", "disc"], "--class disc: expected PHOTOGRAPH=MASK after the name, or a class file"),
        (["--class", disc, str(of_disc[0])], "expected PHOTOGRAPH=MASK"),
        (["--class", file, "--support", of_disc[0]], "--class: names its own supports"),
        (["--class", of_disc[1]], "expected a class file, got another"),
    ):
        with pytest.raises(UserError, match=said):
            run("predict", *checkpoint, *wrong, "--query", of_disc[0], "--out", tmp_path / "wrong")


def test_predict_agrees_with_the_segmenter_called_by_hand(whole_run, shapes_root, tmp_path):
    support = shapes_root / "JPEGImages" / "shapes_000004.jpg"
    label = shapes_root / "SegmentationClassAug" / "shapes_000004.png"
    numbers = np.array(Image.open(label))
    value = int(np.unique(numbers)[1])
    where = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", support, "--mask", label]
    done = run("predict", *where, "--mask-value", value, "--query", support, "--out", tmp_path / "masks")
    segmenter, _ = Segmenter.load(whole_run["4d"]["checkpoint"])
    encoder = build_encoder("tiny_vit")
    with torch.inference_mode():
        features = encoder(to_input(resize_square(read_image(support), 70)[None], encoder.mean, encoder.std))
        mask, void = (torch.from_numpy((numbers == v).astype(np.float32))[None, None] for v in (value, 255))
        known = segmenter.encode_support(features.late[None], mask, void)
        logits = segmenter.segment(features.late, segmenter.embed(features.early), known).mask_logits
        expected = torch.nn.functional.interpolate(logits, size=(224, 224), mode="bilinear")[0, 0] > 0
    assert np.array_equal(np.array(Image.open(done["masks"][0]["mask"])) > 0, expected.numpy())


def test_a_photograph_that_cannot_be_read_costs_no_other_its_mask(whole_run, shapes_root, tmp_path):
    support, label = (
        shapes_root / p for p in ("JPEGImages/shapes_000004.jpg", "SegmentationClassAug/shapes_000004.png")
    )
    (tmp_path / "broken.jpg").write_bytes(support.read_bytes()[:900])
    mask = Image.fromarray((np.array(Image.open(label)) == np.unique(np.array(Image.open(label)))[1]).astype(np.uint8))
    mask.save(tmp_path / "mask.png")
    where = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", support, "--mask", tmp_path / "mask.png"]
    with pytest.raises(UserError, match=r"1 of 2 photographs were not segmented; the first: .*broken\.jpg: expected a"):
        run("predict", *where, "--query", tmp_path / "broken.jpg", support, "--out", tmp_path / "masks")
    written = sorted(p.name for p in (tmp_path / "masks").iterdir())
    assert written == ["panel.png", "results.jsonl", "shapes_000004.png"]


def test_a_run_with_other_settings_is_not_overwritten(whole_run, places):
    with pytest.raises(
        UserError, match=r"a run with other settings is there \(episodic\.lr: expected 0\.5, got 0\.001\)"
    ):
        run("train_episodic", *flags(places), "--fold", FOLD, "--lr", 0.5, "--name", f"fold{FOLD}-4d")


@pytest.mark.slow
def test_a_model_of_all_classes_with_all_that_offline_adds_is_trained_and_used_but_not_tested_here(
    whole_run, places, shapes_root, tmp_path
):
    adds = ["--neighbours", "--self-support", "--fuse", "--upscaling", "bilinear"]
    adds += ["--presence", "--presence-episodes", 16]
    trained = run("train_episodic", *flags(places), "--fold", "none", "--variant", "compact", "--steps", 2, *adds)
    assert trained["fold"] is None and Path(trained["checkpoint"]).parent.name.startswith("all-classes-compact-")
    model, record = Segmenter.load(trained["checkpoint"])
    assert record["fold"] is None and model.config.neighbours and model.config.upscaling == "bilinear"
    assert model.threshold == pytest.approx(record["training"]["presence_threshold"], abs=1e-4)
    assert 0 <= record["training"]["absent_empty"] <= 1 and model.presence.weight.abs().sum() > 0
    of_fold = Segmenter.load(whole_run["4d"]["checkpoint"])[1]
    assert record["base_images"] > of_fold["base_images"]
    seen = "trained for all classes, so it has seen the classes of fold 1; evaluate it on a data set whose classes"
    with pytest.raises(UserError, match=seen):
        run("evaluate", *flags(places), "--fold", FOLD, "--checkpoint", trained["checkpoint"])
    support, label = (
        shapes_root / p for p in ("JPEGImages/shapes_000004.jpg", "SegmentationClassAug/shapes_000004.png")
    )
    mask = (np.array(Image.open(label)) == np.unique(np.array(Image.open(label)))[1]).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    where = ["--checkpoint", trained["checkpoint"], "--support", support, "--mask", tmp_path / "mask.png"]
    done = run("predict", *where, "--query", support, "--out", tmp_path / "masks")
    assert np.array(Image.open(done["masks"][0]["mask"])).shape == mask.shape


def test_a_checkpoint_is_tested_on_the_classes_it_has_not_seen(whole_run, places):
    with pytest.raises(
        UserError, match="trained for fold 1, so it has seen the classes of fold 2; evaluate it on fold 1"
    ):
        run("evaluate", *flags(places), "--fold", 2, "--checkpoint", whole_run["4d"]["checkpoint"])


def test_features_of_other_settings_than_the_stores_are_refused(whole_run, places):
    with pytest.raises(StoreError, match=r"fingerprint mismatch \(norm: expected none, got final\)"):
        run("evaluate", *flags(places), "--fold", FOLD, "--no-late-norm")
    with pytest.raises(StoreError, match=r"fingerprint mismatch \(view_seed: expected 3, got 0\)"):
        run("train_episodic", *flags(places), "--fold", FOLD, "--view-seed", 3)


@pytest.mark.slow
def test_an_adapter_trained_along_needs_no_embeddings_and_is_scored_under_its_own_name(whole_run, places):
    arguments = [*flags(places), "--fold", FOLD, "--adapter", "joint"]
    trained = run("train_episodic", *arguments, "--no-semantic-prompt")
    name = f"fold{FOLD}-4d-no-semantic-prompt-adapter-joint"
    assert trained["checkpoint"] == f"{places['--out']}/{TRAINED}/{name}/final"
    segmenter, record = Segmenter.load(trained["checkpoint"])
    frozen, _ = Segmenter.load(whole_run["4d"]["checkpoint"])
    assert trained["trained_parameters"] == whole_run["4d"]["trained_parameters"] + sum(
        p.numel() for p in segmenter.adapter.parameters()
    ) - sum(p.numel() for p in frozen.prompt.parameters())
    assert record["adapter"]["kind"] == "joint"
    # The checkpoint says how its adapter was made; no flag has to say it again.
    score = run("evaluate", *flags(places), "--fold", FOLD, "--checkpoint", trained["checkpoint"])
    assert score["variant"] == "4d-no-semantic-prompt-adapter-joint"
    with pytest.raises(UserError, match="there is nothing to bake"):
        run("bake_embeddings", *flags(places), "--adapter", "joint")


@pytest.mark.slow
def test_a_random_adapter_has_embeddings_of_its_own_beside_the_distilled_ones(whole_run, places):
    random = [*flags(places), "--adapter", "random"]
    (url,) = run("bake_embeddings", *random)["stores"]
    assert url != whole_run["bake"]["stores"][0] and FeatureStore(url).fingerprint.made_from is not None
    trained = run("train_episodic", *random, "--fold", FOLD)
    score = run("evaluate", *flags(places), "--fold", FOLD, "--checkpoint", trained["checkpoint"])
    assert score["variant"] == "4d-adapter-random"


@pytest.mark.slow
def test_two_workers_train_what_one_does(whole_run, places, tmp_path):
    """The shares of a batch are equal, so the mean of their gradients is the batch's."""
    alone = run("distill", *flags({**places, "--out": tmp_path / "one"}))
    for a, b in zip(alone["stages"], whole_run["distill"]["stages"], strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-3)


@pytest.mark.slow
def test_two_workers_report_the_loss_of_the_whole_batch(whole_run, places):
    """Cross-entropy is over the pixels of both halves, whatever their shares of void."""
    both = run("train_episodic", *flags(places), "--fold", FOLD, "--name", "two", "--workers", 2, "--worker-cpus", 0.5)
    assert both["loss"] == pytest.approx(whole_run["4d"]["loss"], rel=2e-4)


def test_relative_paths_mean_the_same_place_to_the_workers(whole_run, places):
    final = Path(places["--out"]) / TRAINED / f"fold{FOLD}-compact" / "final"
    assert (final / "segmenter.json").exists() and whole_run["compact"]["checkpoint"] == str(final)


def test_a_cluster_too_small_is_said_at_once(whole_run, places):
    with pytest.raises(UserError, match="4 workers of 64 CPU: expected a cluster with 256 CPU"):
        run("train_episodic", *flags(places), "--fold", FOLD, "--name", "big", "--workers", 4, "--worker-cpus", 64)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_user_as_it_was_raised(whole_run, places, tmp_path, workers):
    """A store that is damaged after the driver opened it: its own error, not Ray's."""
    copy = tmp_path / "stores"
    for url in tools.find(str(places["--store"])):
        tools.copy(url, f"{copy}/{Path(url).relative_to(places['--store'])}")
    shard = copy / "shapes" / "tiny_vit" / "late@70" / "c" / "0" / "0" / "0" / "0"
    shard.write_bytes(bytes(shard.stat().st_size))
    damaged = {**places, "--store": copy}
    these = ["--workers", workers, "--worker-cpus", 0.5, "--name", f"damaged-{workers}"]
    with pytest.raises(StoreError, match=r"late@70: shard 0 has a damaged index"):
        run("train_episodic", *flags(damaged), "--fold", FOLD, *these)


def test_how_a_test_is_scored_makes_no_other_model(whole_run, places):
    scoring = ["--align-corners", "True", "--scored-at", "square"]
    assert run("train_episodic", *flags(places), "--fold", FOLD, *scoring) == whole_run["4d"]
    with pytest.raises(UserError, match=r"other settings is there \(.*rules.drops_novel: expected False, got True"):
        run("train_episodic", *flags(places), "--fold", FOLD, "--protocol", "hsnet", "--name", f"fold{FOLD}-4d")


def test_a_report_holds_every_method(whole_run, places, capsys, tmp_path):
    result = run("report", *flags(places, "--tracking-uri"), "--dataset", "shapes", "--out", tmp_path / "report")
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert set(rows) >= {"prototype", "nearest", "compact", "4d", "FS-DINO", "GF-SAM"}
    found = result["methods"]["shapes, hdmnet, 1-shot, 20 episodes"]
    assert found["4d"][str(FOLD)]["0"]["miou"] == pytest.approx(whole_run["score 4d"]["miou"], abs=1e-4)
    page = Path(result["html"]).read_text()
    assert "<svg" in page and "data:image/jpeg;base64," in page and "Table 3: FSS-1000 and DAVIS-17" in page


def test_a_study_skips_what_is_done_and_ends_with_its_table(whole_run, places, capsys):
    arguments = [*flags(places), "--folds", FOLD, "--shots", 1, "--methods", "prototype", "--variants", "compact", "4d"]
    two = ["--workers", 1]
    result = run("reproduce", *arguments, *two)
    scores = {name: folds[str(FOLD)]["0"]["miou"] for name, folds in result["scores"]["1-shot"].items()}
    for method in ("prototype", "compact", "4d"):
        assert scores[method] == pytest.approx(whole_run[f"score {method}"]["miou"], abs=1e-6)
    captured = capsys.readouterr()
    assert "| shapes, 1-shot, mIoU (FB-IoU) |" in captured.out and "100%" in captured.err
    log = (Path(places["--out"]) / "reproduce.log").read_text()
    assert "distil (distill)" in log and "extracting" not in log


@pytest.mark.slow
def test_extraction_and_training_on_s3_equal_those_on_disk(whole_run, places, s3_endpoint, tmp_path):
    stop_ray()  # its workers know nothing of the endpoint
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
    result = result_of(command("train_episodic", *flags(elsewhere), "--fold", FOLD, "--name", "from-s3", *cached))
    assert result["loss"] == whole_run["4d"]["loss"]
    assert len([p for p in (tmp_path / "cache").glob("*/*") if p.name.isdigit()]) > 10
