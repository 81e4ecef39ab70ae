"""Evaluations that must agree: by any number of processes, from stores or straight from images, seed by seed."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fsdino.data import protocols
from fsdino.data.dataset import open_dataset
from fsdino.data.views import PADDED, View
from fsdino.errors import UserError
from fsdino.video import jaccard
from pipelines import tracking
from pipelines.scoring import enlarged, told_apart, voted
from tests.conftest import FOLD, TRAINED, flags, run

MEASURES = ("miou", "fb_iou", "boundary_iou", "per_class")


def evaluate(places, *more):
    return run("evaluate", *flags(places), "--fold", FOLD, *more)


def elsewhere(places, tmp_path):
    """The same stores, and scores of one's own."""
    return {**places, "--out": tmp_path / "runs"}


@pytest.fixture
def checkpoint(whole_run):
    return ["--checkpoint", whole_run["4d"]["checkpoint"]]


@pytest.mark.parametrize(
    "tasks", [2, pytest.param(4, marks=pytest.mark.slow)]
)  # half a core each, so that two cores carry four
def test_any_number_of_processes_counts_the_same(whole_run, places, tmp_path, checkpoint, tasks):
    many = [*checkpoint, "--episodes", 24, "--seeds", 2]
    one = evaluate(elsewhere(places, tmp_path / "one"), *many)
    several = evaluate(elsewhere(places, tmp_path / "several"), *many, "--tasks", tasks, "--task-cpus", 0.5)
    assert {m: several[m] for m in MEASURES} == {m: one[m] for m in MEASURES}


def test_features_straight_from_images_score_within_the_caches_precision(whole_run, places, tmp_path, checkpoint):
    nothing = {**elsewhere(places, tmp_path), "--store": tmp_path / "no-stores"}
    for method in (checkpoint, ["--method", "prototype"]):
        stored, live = evaluate(places, *method), evaluate(nothing, *method, "--from-images")
        assert live["miou"] == pytest.approx(stored["miou"], abs=2e-3)
        assert live["fb_iou"] == pytest.approx(stored["fb_iou"], abs=2e-3)


def test_several_seeds_give_their_mean_and_deviation_and_each_is_kept(whole_run, places, checkpoint):
    both = evaluate(places, *checkpoint, "--seeds", 3, "--test-seed", 5)
    alone = [evaluate(places, *checkpoint, "--test-seed", seed) for seed in (5, 6, 7)]
    values = [one["miou"] for one in alone]
    assert [s["miou"] for s in both["seeds"]] == values and len(set(values)) == 3
    assert both["miou"] == pytest.approx(np.mean(values)) and both["std"]["miou"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert [s["seed"] for s in both["seeds"]] == [5, 6, 7]
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    ids = [client.get_experiment_by_name("evaluate/shapes").experiment_id]
    of_seeds = "tags.summary = 'seeds' AND params.test_seed = '[5, 6, 7]'"
    (parent,) = client.search_runs(ids, of_seeds)
    children = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_name[-6:] for child in children} == {"-seed5", "-seed6", "-seed7"}
    assert parent.data.metrics["miou"] == both["miou"] and parent.data.metrics["miou_std"] == both["std"]["miou"]
    again = evaluate(places, *checkpoint, "--seeds", 3, "--test-seed", 5)
    assert again == both and len(client.search_runs(ids, of_seeds)) == 1


def test_every_episode_is_a_row_from_which_the_score_can_be_counted(whole_run, places, checkpoint):
    score = evaluate(places, *checkpoint)
    folder = Path(places["--out"]) / TRAINED / "scores"
    tables = [pq.read_table(path).to_pandas() for path in folder.glob(f"fold{FOLD}-4d-1shot-*.parquet")]
    of_classes = [t.groupby("class")[["intersection", "union"]].sum() for t in tables if len(t) == 20]
    mious = [(sums["intersection"] / sums["union"]).mean() for sums in of_classes]
    assert any(miou == pytest.approx(score["miou"], abs=1e-9) for miou in mious)
    rows = tables[0]
    assert set(rows["query"]) <= set(open_dataset(str(places["--data"])).ids("val")) and len(rows["supports"][0]) == 1


def test_mlflow_has_the_episodes_and_pictures_of_the_best_and_the_worst(whole_run, places):
    client = tracking.MlflowClient(str(places["--tracking-uri"]))
    found = client.search_runs([client.get_experiment_by_name("evaluate/shapes").experiment_id])
    kept = {f.path for of in found for f in client.list_artifacts(of.info.run_id, "panels")}
    assert {"panels/best.png", "panels/worst.png", "panels/test.png"} <= kept
    assert "episodes.parquet" in {f.path for of in found for f in client.list_artifacts(of.info.run_id)}


def test_classes_that_are_told_apart_share_the_pixels_of_each_query(whole_run, places, tmp_path, checkpoint):
    score = evaluate(places, *checkpoint, "--ways", 3, "--masks", tmp_path / "masks")
    alone = evaluate(places, *checkpoint)
    dataset = open_dataset(str(places["--data"]))
    saved: dict[str, dict[int, np.ndarray]] = {}
    for path in (tmp_path / "masks").iterdir():
        number, class_id, query = path.stem.split("_", 2)
        saved.setdefault(f"{number} {query}", {})[int(class_id)] = np.array(Image.open(path)) > 0
    assert len(saved) == 20 and all(sorted(of) == dataset.novel(FOLD) for of in saved.values())
    sums = {class_id: np.zeros(2) for class_id in dataset.novel(FOLD)}
    for key, masks in saved.items():
        assert np.sum([*masks.values()], axis=0).max() <= 1, "two classes claim a pixel"
        for class_id, mask in masks.items():
            label = dataset.mask(key.split(" ", 1)[1], class_id)
            valid, truth = label != 255, label == 1
            sums[class_id] += ((mask & truth).sum(), ((mask | truth) & valid).sum())
    assert score["miou"] == pytest.approx(np.mean([i / u for i, u in sums.values()]), abs=1e-6)
    assert score["ways"] == 3 and "ways" not in alone and score["miou"] < alone["miou"]
    for more in (["--absent"], ["--fusion", "vote", "--shots", 2]):
        with pytest.raises(UserError, match="--ways: has no meaning"):
            evaluate(places, *checkpoint, "--ways", 2, *more)
    with pytest.raises(UserError, match="--ways 4: expected at most the 3 classes of the fold"):
        evaluate(places, *checkpoint, "--ways", 4)


def test_a_pixel_belongs_to_the_largest_logit_above_zero():
    logits = torch.tensor([[[1.0, -1.0, 2.0, -3.0]], [[0.5, 3.0, 2.5, -0.1]]])
    assert [mask.tolist() for mask in told_apart(logits)] == [
        [[True, False, False, False]],
        [[False, True, True, False]],
    ]


def test_absent_objects_are_scored_by_the_share_of_empty_masks(whole_run, places, tmp_path):
    score = evaluate(places, "--method", "nearest", "--absent", "--masks", tmp_path / "masks")
    saved = {path.stem: np.array(Image.open(path)) > 0 for path in (tmp_path / "masks").iterdir()}
    assert len(saved) == 20 and score["absent"] and "miou" not in score
    assert score["empty"] == pytest.approx(np.mean([not mask.any() for mask in saved.values()]))
    dataset = open_dataset(str(places["--data"]))
    queries = {stem: stem.split("_", 2)[2] for stem in saved}
    scored = np.mean([(saved[s] & (dataset.label(q) != 255)).mean() for s, q in queries.items()])  # void counts nowhere
    assert score["false_area"] == pytest.approx(scored, abs=1e-5)
    dataset = open_dataset(str(places["--data"]))
    for stem in saved:
        _, class_id, query = stem.split("_", 2)
        assert not (dataset.mask(query, int(class_id)) == 1).any() and int(class_id) in dataset.novel(FOLD)


def test_five_supports_may_vote(whole_run, places, checkpoint):
    average = evaluate(places, *checkpoint, "--shots", 2)
    vote = evaluate(places, *checkpoint, "--shots", 2, "--fusion", "vote")
    assert (average["fusion"], vote["fusion"]) == ("average", "vote") and average["miou"] != vote["miou"]


def test_the_vote_is_relative_to_the_images_best_pixel():
    masks = np.zeros((5, 1, 6), bool)
    for pixel, votes in enumerate((0, 1, 2, 3, 4, 4)):
        masks[:votes, 0, pixel] = True
    assert voted(masks).tolist() == [[False, False, True, True, True, True]]  # half of 4
    assert voted(masks[:, :, :2]).tolist() == [[False, True]]  # half of 1
    assert not voted(masks[:, :, :1]).any() and voted(masks[:1]).tolist() == masks[0].tolist()


def test_logits_of_a_padded_view_are_cut_to_the_photograph():
    label = np.arange(600).reshape(20, 30) % 3
    view = View(pad=True)
    square = torch.from_numpy(view.label(label.astype(np.uint8), 30)).float()[None]
    found = enlarged(square, view.extent((20, 30)), (20, 30), align_corners=False)
    assert np.array_equal(found[0].numpy(), label) and (square[0, 20:] == 255).all()
    assert View().extent((20, 30)) == (20, 30) and PADDED > 10_000


def test_a_method_that_lacks_what_it_prompts_says_so(whole_run, places):
    with pytest.raises(
        UserError, match="--method peak: expected a decoder that takes points, but recipe tiny has none"
    ):
        evaluate(places, "--method", "peak")


def test_insid3s_matching_runs_on_the_same_features(whole_run, places):
    score = evaluate(places, "--method", "matching")
    assert score["variant"] == "matching" and score["miou"] != whole_run["score prototype"]["miou"]


@pytest.fixture
def videos(tmp_path):
    """Two videos of a square that moves over noise, one with two squares, as DAVIS 2017."""
    rng = np.random.default_rng(0)
    root = tmp_path / "DAVIS"
    for video, objects in (("one", 1), ("two", 2)):
        for folder in ("JPEGImages", "Annotations"):
            (root / folder / "480p" / video).mkdir(parents=True)
        for frame in range(6):
            pixels, label = rng.integers(90, 110, (70, 90, 3), dtype=np.uint8), np.zeros((70, 90), np.uint8)
            for number in range(1, objects + 1):
                y, x = 5 + 30 * (number - 1), 5 + 8 * frame
                pixels[y : y + 25, x : x + 25] = (250, 20, 20) if number == 1 else (20, 20, 250)
                label[y : y + 25, x : x + 25] = number
            Image.fromarray(pixels).save(root / "JPEGImages" / "480p" / video / f"{frame:05d}.jpg", quality=95)
            Image.fromarray(label).save(root / "Annotations" / "480p" / video / f"{frame:05d}.png")
    path = root / "ImageSets" / "2017" / "val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("one\ntwo\n")
    return root


def test_a_model_of_another_data_set_is_scored_on_videos(whole_run, places, tmp_path, videos, checkpoint):
    arguments = [*flags(elsewhere({**places, "--data": videos}, tmp_path)), "--fold", 0, "--from-images"]
    score = run("evaluate", *arguments, *checkpoint, "--masks", tmp_path / "masks")
    assert score["dataset"] == "davis-2017" and score["trained_on"] == f"shapes, fold {FOLD}"
    assert set(score["per_object"]) == {"one/1", "two/1", "two/2"} and score["episodes"] == 8
    assert score["j_and_f"] == pytest.approx((score["j"] + score["f"]) / 2)
    dataset = open_dataset(str(videos))
    for video in dataset.videos:
        for number, class_id in enumerate(video.objects, start=1):
            values = []
            for frame in video.frames[1:-1]:
                saved = np.array(Image.open(tmp_path / "masks" / f"{frame}.png"))
                values.append(jaccard(saved == number, dataset.mask(frame, class_id) == 1))
            name = dataset.class_names[class_id - 1]
            assert score["per_object"][name]["j"] == pytest.approx(np.mean(values), abs=1e-6)
    remembered = run("evaluate", *arguments, *checkpoint, "--memory", 2, "--memory-confidence", 0.5)
    assert remembered["memory"] == [2, 0.5] and remembered["j"] != score["j"]
    with pytest.raises(UserError, match="--seeds: has no meaning for videos"):
        run("evaluate", *arguments, *checkpoint, "--seeds", 2)


def test_a_plan_of_scoring_travels_to_other_processes(whole_run, places):
    dataset = open_dataset(str(places["--data"]))
    dataset.class_pixels("val")
    assert pickle.loads(pickle.dumps(dataset)).class_pixels("val") == dataset.class_pixels("val")


def test_a_protocol_that_pads_its_test_images_is_a_value_and_nothing_else(places, tmp_path, monkeypatch, shapes_root):
    """PFENet's and BAM's test geometry: extraction, loading and scoring follow from the protocol alone."""
    monkeypatch.setitem(protocols.PROTOCOLS, "padded", replace(protocols.HDMNET, name="padded", test_view=PADDED))
    root = shutil.copytree(shapes_root, tmp_path / "wide")
    for path in (*(root / "JPEGImages").iterdir(), *(root / "SegmentationClassAug").iterdir()):
        Image.open(path).crop((0, 0, 224, 150)).save(path, quality=95)
    here = {**elsewhere(places, tmp_path), "--data": root, "--store": tmp_path / "stores"}
    extracted = run("extract_features", *flags(here), "--protocol", "padded", "--features", "late", "--splits", "val")
    assert extracted["samples"] == 80  # 40 images, plain and padded
    scores = {p: evaluate(here, "--method", "prototype", "--protocol", p) for p in ("padded", "hdmnet")}
    live = evaluate(here, "--method", "prototype", "--protocol", "padded", "--from-images")
    assert scores["padded"]["rules"]["test_view"] == PADDED and scores["padded"]["miou"] != scores["hdmnet"]["miou"]
    assert live["miou"] == pytest.approx(scores["padded"]["miou"], abs=2e-3)
