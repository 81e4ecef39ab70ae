"""Annotating many photographs: what is written, and what survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fsdino.errors import UserError
from fsdino.predictor import Predictor
from pipelines import annotating, annotation
from tests.conftest import ROOT, flags, run, stop_ray

PHOTOGRAPHS, SHARD = 19, 8


@pytest.fixture(scope="module")
def photos(shapes_root, tmp_path_factory):
    """Photographs of several sizes in folders, one of which is none."""
    root = tmp_path_factory.mktemp("photos")
    listed = sorted((shapes_root / "JPEGImages").iterdir())[: PHOTOGRAPHS - 1]
    for number, path in enumerate(listed):
        folder = root / f"day{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.open(path).resize((160 + 8 * number, 120)).save(folder / f"{number:02d}.png")
    (root / "day1" / "broken.png").write_bytes(b"no photograph")
    return root


@pytest.fixture(scope="module")
def example(shapes_root):
    """A photograph with two classes, and their values in its label."""
    for label in sorted((shapes_root / "SegmentationClassAug").iterdir()):
        values = sorted(set(np.unique(np.asarray(Image.open(label))).tolist()) - {0, 255})
        if len(values) > 1:
            return shapes_root / "JPEGImages" / f"{label.stem}.jpg", label, values[:2]
    raise AssertionError("no photograph with two classes")


@pytest.fixture(scope="module")
def setup(whole_run, places, photos, example, tmp_path_factory):
    """Flags of an annotation: two classes registered from one photograph."""
    checkpoint, (photograph, label, values) = whole_run["4d"]["checkpoint"], example
    folder, classes = tmp_path_factory.mktemp("classes"), []
    for value in values:
        file = folder / f"{value}.class"
        shown = ["--support", photograph, "--mask", label, "--mask-value", value]
        run("register", "--checkpoint", checkpoint, "--name", f"class {value}", *shown, "--out", file)
        classes += ["--class", file]
    common = ["--checkpoint", checkpoint, "--images", photos, "--shard-images", SHARD, "--max-bad-share", 0.1]
    return [*common, *classes, *flags(places, "--tracking-uri"), "--actor-cpus", 0.5, "--decode-cpus", 0.25]


@pytest.fixture(scope="module")
def annotated(setup, tmp_path_factory):
    """An undisturbed annotation: its folder, and what the command returned."""
    out = tmp_path_factory.mktemp("annotated") / "of-shapes"
    return out, run("annotate", *setup, "--to", out)


def contents(folder):
    """All that is written of the shards, but for the seconds that they took."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name.startswith("part-")}
    for name in [name for name in found if name.endswith(".json") and "coco" not in name]:
        found[name] = json.loads(found[name]) | {"seconds": 0}
    return found


def decoded(row):
    size = [row["height"], row["width"]]
    return coco_mask.decode({"size": size, "counts": row["rle"].encode()}) > 0 if row["area"] else np.zeros(size, bool)


def rows_of(folder):
    return [row for path in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_annotations_are_what_the_predictor_finds_in_each_photograph(annotated, setup, photos):
    out, result = annotated
    predictor = Predictor.load(setup[1])
    from fsdino.predictor import ClassEncoding

    classes = [ClassEncoding.load(setup[i + 1]) for i, flag in enumerate(setup) if flag == "--class"]
    rows = rows_of(out)
    assert len(rows) == 2 * (PHOTOGRAPHS - 1) and result["photographs"] == PHOTOGRAPHS - 1
    found = dict.fromkeys((c.name for c in classes), 0)
    for row in rows:
        with Image.open(photos / row["image_id"]) as image:
            predictor.set_image(image)
            assert (row["width"], row["height"]) == image.size
        number = [c.name for c in classes].index(row["class"])
        logits = next(predictor.logits(classes)).mask[number].numpy()
        mask = decoded(row)
        if row["area"]:
            sure = 1 / (1 + np.exp(-logits[mask].astype(float)))
            assert row["score"] == pytest.approx(sure.mean(), abs=2e-3)
            found[row["class"]] += 1
            columns = np.flatnonzero(mask.any(0))
            assert row["bbox"][0] == columns[0] and row["bbox"][2] == len(range(columns[0], columns[-1] + 1))
        assert row["area"] == mask.sum()
        assert not ((mask != (logits > 0)) & (np.abs(logits) > 0.02)).any(), "logits travel as halves"
    assert result["found"] == found and sum(found.values()), "nothing was found in any of them"


def test_a_shard_of_coco_is_read_by_its_own_tools_and_says_the_same(annotated):
    out, _ = annotated
    ids, rows = set(), {(row["image_id"], row["class"]): row for row in rows_of(out)}
    for path in sorted(out.glob("*.coco.json")):
        shard = COCO(path)
        names = {number: one["name"] for number, one in shard.cats.items()}
        for record in shard.dataset["annotations"]:
            assert record["id"] not in ids and not ids.add(record["id"])
            row = rows[shard.imgs[record["image_id"]]["file_name"], names[record["category_id"]]]
            assert shard.annToMask(record).sum() == row["area"] == record["area"]
    assert len(ids) == sum(row["area"] > 0 for row in rows.values())


def test_a_photograph_that_cannot_be_read_is_named_and_left_out(annotated, setup, capsys):
    out, result = annotated
    assert result["left_out"] == 1
    again = run("annotate", *setup, "--to", out)
    assert again == result and "nothing to do" in capsys.readouterr().err
    (bad,) = [json.loads(p.read_text())["bad"] for p in sorted(out.glob("part-??????.json"))][-1:]
    assert list(bad) == ["day1/broken.png"]


def test_only_shards_without_a_marker_are_written_again_and_equal_the_first(annotated, setup, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(annotated[0], out)
    before = contents(out)
    kept = (out / "part-000000.parquet").stat().st_mtime_ns
    (out / "part-000001.json").unlink()
    (out / "part-000001.parquet").write_bytes(b"half")
    run("annotate", *setup, "--to", out)
    assert contents(out) == before and (out / "part-000000.parquet").stat().st_mtime_ns == kept


@pytest.mark.slow
@pytest.mark.parametrize("kept", [[], ["--keep-features"]])
def test_shards_of_photographs_that_changed_are_written_again_and_no_others(setup, photos, tmp_path, capsys, kept):
    own, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos / "day0", own)
    line = ["--images", own, "--shard-images", 4, "--to", out, *kept, "--store", tmp_path / "stores"]
    run("annotate", *setup, *line)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    last = sorted(own.iterdir())[-1]
    Image.new("RGB", (50, 40)).save(last)
    (own / "new.png").write_bytes(last.read_bytes())
    capsys.readouterr()
    run("annotate", *setup, *line)
    assert "1 shards are damaged, or of photographs that have changed" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert [name for name in sorted(after) if after[name] != before.get(name)] == ["part-000002.parquet"]
    assert {row["width"] for row in rows_of(out) if row["image_id"] in (last.name, "new.png")} == {50}


def test_a_photograph_that_shows_nothing_is_a_row_that_can_be_read_back(tmp_path):
    shown = {"image_id": "a", "class": "cat", "area": 6, "bbox": [1.0, 2.0, 3.0, 2.0], "rle": "x"}
    rows = [shown, {"image_id": "b", "class": "cat", "area": 0, "bbox": None, "rle": None}]
    pq.write_table(pa.Table.from_pylist(rows, annotating.SCHEMA), tmp_path / "part.parquet")
    back = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert [(row["image_id"], row["bbox"]) for row in back] == [("a", shown["bbox"]), ("b", None)]


def test_a_rate_is_counted_from_when_every_actor_has_written_a_shard():
    times = [(30.0, 10), (30.2, 20), (40.0, 30), (40.2, 40), (50.0, 50)]
    assert annotation.rate(times, 2) == pytest.approx((50 - 20) / (50.0 - 30.2))
    assert annotation.rate(times[:2], 2) == pytest.approx(20 / 30.2), "two shards of two actors tell of the start too"
    assert annotation.rate(times[:1], 8) == pytest.approx(10 / 30)


@pytest.mark.slow
def test_features_that_are_kept_give_the_same_masks_and_are_computed_once(
    annotated, setup, photos, tmp_path, capsys, monkeypatch
):
    stored = [*setup, "--keep-features", "--store", tmp_path / "stores"]
    run("annotate", *stored, "--to", tmp_path / "first")
    for one, other in zip(rows_of(annotated[0]), rows_of(tmp_path / "first"), strict=True):
        assert (one["image_id"], one["class"]) == (other["image_id"], other["class"])
        masks = [decoded(row) for row in (one, other)]
        assert (masks[0] != masks[1]).mean() < 0.005, "features are kept as halves"
        assert (one["score"] is None) == (other["score"] is None) or min(one["area"], other["area"]) < 20
    capsys.readouterr()
    run("annotate", *stored, "--instances", "--to", tmp_path / "second")
    assert "nothing to do" in capsys.readouterr().err, "features were computed again"
    assert len(rows_of(tmp_path / "second")) >= len(rows_of(tmp_path / "first"))
    classes = [word for at, word in enumerate(setup) if "--class" in (word, setup[at - 1])]
    line = [*setup[:2], "--query", photos, *classes, "--out", tmp_path / "masks", "--format", "coco"]
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "set_images", None)  # so that it fails if the encoder runs
        with pytest.raises(UserError, match=r"1 of 19 photographs were not segmented; the first: .*broken\.png"):
            run("predict", *line, "--store", tmp_path / "stores")
    made = COCO(tmp_path / "masks" / "annotations.json")
    ids = {(image["file_name"], c["name"]): (i, k) for i, image in made.imgs.items() for k, c in made.cats.items()}
    for row in rows_of(tmp_path / "first"):
        image, category = ids[row["source"], row["class"]]
        found = made.loadAnns(made.getAnnIds([image], [category]))
        mask = made.annToMask(found[0]) if found else np.zeros((row["height"], row["width"]), np.uint8)
        assert (mask != decoded(row)).mean() < 0.005
    with pytest.raises(UserError, match=r"expected features of the photographs at .*, found none"):
        run("predict", *line, "--store", tmp_path / "nothing")


def test_a_trial_annotates_a_few_of_a_list_and_says_what_all_take(setup, photos, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/day0/00.png\n\n{photos}/day1/01.png\n{photos}/day0/02.png\n")
    line = ["--images", listed, "--shard-images", 2, "--trial", 1, "--price", 2]
    result = run("annotate", *setup, *line, "--to", tmp_path / "out")
    assert result["shards"] == "1 of 2" and result["photographs"] == 2
    assert "3 take" in (told := capsys.readouterr().err) and "at 2 an hour" in told
    assert [row["image_id"] for row in rows_of(tmp_path / "out")][::2] == listed.read_text().split()[:2]


@pytest.mark.parametrize(
    "change, said",
    [
        (["--shard-images", 4], "holds annotations with another shard_images"),
        (["--instances"], "another instances"),
        (["--images", ROOT / "examples"], "another images"),
        (["--images", "nowhere.txt"], "found no file"),
        (["--images", "nowhere"], "expected photographs, found none"),
        (["--class", "nowhere.class"], "or a class file"),
        pytest.param(["--max-bad-share", 0], "more than --max-bad-share", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_annotated_is_refused_in_one_line(annotated, setup, tmp_path, change, said):
    out = tmp_path / "new" if "--max-bad-share" in change else annotated[0]
    with pytest.raises(UserError, match=said):
        run("annotate", *setup, "--to", out, *change)


@pytest.mark.slow
def test_an_annotation_on_s3_that_is_killed_ends_as_an_undisturbed_one(annotated, setup, s3_endpoint, tmp_path):
    import fsspec

    stop_ray()
    bucket, out = fsspec.filesystem("s3"), "s3://features/annotations"
    line = [sys.executable, "-m", "pipelines.annotate", *map(str, setup), "--to", out]
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, env=os.environ)
    for _ in range(1200):
        if bucket.exists(f"{out}/part-000000.json") or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    run("annotate", *setup, "--to", out)
    bucket.get(out, str(tmp_path / "there"), recursive=True)
    assert contents(tmp_path / "there") == contents(annotated[0])
