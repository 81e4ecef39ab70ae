"""COCO's annotations as class maps, against masks drawn by hand and pycocotools' own reading of them."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from upath import UPath

from fsdino.data.dataset import open_dataset
from fsdino.data.inspection import inspect
from fsdino.data.instances import read_instances
from fsdino.data.protocols import HDMNET
from fsdino.errors import UserError
from tests.conftest import DATA

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]


def annotation(number, segmentation, *, category=18, image=1, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": crowd,
        "segmentation": segmentation,
        "area": 1,
    }


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def runs(mask):
    """Run lengths of a mask, down the columns, as a list."""
    flat = mask.ravel(order="F").tolist()
    counts, value, length = [], 0, 0
    for pixel in flat:
        if pixel != value:
            counts.append(length)
            value, length = pixel, 0
        length += 1
    return {"size": list(mask.shape), "counts": [*counts, length]}


def write(path, annotations, images=((1, "1.jpg", 20, 10),), categories=CATEGORIES):
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [{"id": i, "file_name": name, "width": w, "height": h} for i, name, w, h in images]
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return UPath(path)


def label(tmp_path, *annotations, **how):
    return read_instances(write(tmp_path / "instances.json", list(annotations), **how)).label(0)


SQUARE = np.zeros((10, 20), int)
SQUARE[2:6, 3:9] = 1


def test_polygons_and_both_kinds_of_run_lengths_are_the_same_mask(tmp_path):
    drawn = runs(SQUARE)
    compressed = rle.frPyObjects(drawn, 10, 20)
    forms = [box(3, 2, 6, 4), drawn, {"size": [10, 20], "counts": compressed["counts"].decode()}]
    for number, form in enumerate(forms):
        assert np.array_equal(label(tmp_path / str(number), annotation(1, form)), SQUARE)


def test_the_later_object_is_seen_and_a_crowd_only_where_no_object_is(tmp_path):
    found = label(
        tmp_path,
        annotation(1, runs(np.ones((10, 20), int)), crowd=1),
        annotation(2, box(2, 2, 10, 6), category=90),
        annotation(3, box(4, 4, 2, 2)),
    )
    expected = np.full((10, 20), 255)
    expected[2:8, 2:12] = 2
    expected[4:6, 4:6] = 1
    assert np.array_equal(found, expected)
    hidden = label(tmp_path / "b", annotation(3, box(4, 4, 2, 2)), annotation(2, box(2, 2, 10, 6), category=90))
    assert set(np.unique(hidden)) == {0, 2}


def test_polygons_of_two_points_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.json", [annotation(1, [[1, 1, 2, 2]]), annotation(2, [*box(3, 2, 6, 4), [1, 1, 2, 2]])])
    found = read_instances(path)
    assert np.array_equal(found.label(0), SQUARE) and found.skipped_polygons == 2
    assert read_instances(path).notes("x") == ["x: 2 polygons of fewer than three points are skipped"]


def test_what_was_read_once_comes_from_the_cache_and_a_changed_file_does_not(tmp_path):
    path = write(tmp_path / "a.json", [annotation(1, box(3, 2, 6, 4))])
    first, again = read_instances(path), read_instances(path)
    assert again.names == first.names and again.class_names == ["dog", "toothbrush"]
    assert np.array_equal(again.label(0), first.label(0))
    write(tmp_path / "a.json", [annotation(1, box(3, 2, 6, 4), category=90)])
    assert read_instances(path).label(0).max() == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"segmentation": {"size": [20, 10], "counts": [200]}},
            "annotation 7: expected run lengths of the image",
        ),
        (
            {"segmentation": {"size": [10, 20], "counts": [100, 90]}},
            "annotation 7: expected run lengths that fill",
        ),
        ({"segmentation": {"size": [10, 20], "counts": "zzz"}}, "annotation 7: expected run lengths that fill"),
        ({"segmentation": {"size": [10, 20], "counts": "P"}}, "annotation 7: expected run lengths that fill"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "annotation 7: expected polygons as lists of x, y"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "annotation 7: expected polygons as lists of x, y"),
        ({"segmentation": None}, "annotation 7: expected polygons or run lengths, got None"),
        ({"iscrowd": "0"}, "annotation 7: expected iscrowd 0 or 1, got '0'"),
        ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, "annotation 7: expected polygons as lists of x, y"),
        ({"image_id": 5}, "annotation 7: expected an image of the file, got image_id 5"),
        ({"category_id": 5}, "annotation 7: expected a category of the file, got category_id 5"),
        ({"category_id": "x"}, "annotation 7: expected a whole number category_id, got 'x'"),
    ],
)
def test_an_annotation_that_cannot_be_right_is_named(tmp_path, change, expected):
    path = write(tmp_path / "a.json", [annotation(7, box(3, 2, 6, 4)) | change])
    with pytest.raises(UserError, match=f"a.json: {expected}"):
        read_instances(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": []}', '{"images": 1, "annotations": [], "categories": []}']
)
def test_a_file_that_is_not_cocos_is_a_users_mistake(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json: expected COCO's JSON"):
        read_instances(UPath(tmp_path / "a.json"))


@pytest.fixture
def coco(tmp_path):
    """Two images of val and one of train, in COCO's layout, with 80 categories."""
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    for split, names in (("train", ["a"]), ("val", ["b", "c"])):
        images = [(i, f"{name}.jpg", 200, 100) for i, name in enumerate(names)]
        marks = [annotation(i, box(10, 10, 60, 60), category=3 + i, image=i) for i in range(len(names))]
        write(tmp_path / "annotations" / f"instances_{split}2017.json", marks, images, categories)
        (tmp_path / f"{split}2017").mkdir()
        for name in names:
            Image.new("RGB", (200, 100)).save(tmp_path / f"{split}2017" / f"{name}.jpg")
    return tmp_path


def test_coco_is_recognised_and_its_folds_are_every_fourth_class(coco):
    dataset = open_dataset(str(coco))
    assert (dataset.name, dataset.kind, dataset.folds.rule) == ("coco-20i-2017", "coco2017", "f+4v")
    assert dataset.ids("train") == ["a"] and dataset.ids("val") == ["b", "c"]
    assert dataset.novel(2)[:2] == [3, 7] and dataset.source("c") == f"{coco}/val2017/c.jpg"
    assert dataset.class_pixels("val") == {"b": {3: 3600}, "c": {4: 3600}}
    assert dataset.mask("b", 3).sum() == 3600 and not dataset.mask("b", 4).any()
    assert list(HDMNET.test_images(dataset, 2)) == ["b"] and HDMNET.of(dataset).episodes == 10_000
    assert not HDMNET.training_images(dataset, 2) and list(HDMNET.training_images(dataset, 1)) == ["a"]
    worker = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 10_000 and np.array_equal(worker.label("b"), dataset.label("b"))


def test_two_years_in_one_folder_have_to_be_told_apart(coco):
    for split in ("train", "val"):
        shutil.copy(coco / f"annotations/instances_{split}2017.json", coco / f"annotations/instances_{split}2014.json")
    with pytest.raises(UserError, match="found coco2014 and coco2017; choose one with --dataset"):
        open_dataset(str(coco))
    assert open_dataset(str(coco), "coco2014").name == "coco-20i"
    with pytest.raises(UserError, match="expected a data set of --dataset voc, which has JPEGImages"):
        open_dataset(str(coco), "voc")


def test_an_inspection_names_a_photograph_that_the_json_has_and_the_folder_lacks(coco):
    (coco / "val2017" / "c.jpg").unlink()
    Image.new("RGB", (100, 200)).save(coco / "val2017" / "b.jpg")
    problems = "\n".join(inspect(open_dataset(str(coco))).problems)
    assert "val2017/c.jpg: expected an image file, found nothing there" in problems
    assert "instances_val2017.json: 200x100, but its photograph" in problems and "b.jpg is 100x200" in problems


@pytest.mark.real_data
def test_the_class_maps_of_real_annotations_are_pycocotools_own_painted_in_their_order():
    root = DATA / "coco"
    if not root.is_dir():
        pytest.skip(f"the COCO photographs are not at {root}")
    dataset = open_dataset(str(root))
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    rank = {number: rank for rank, number in enumerate(sorted(c["id"] for c in content["categories"]), start=1)}
    assert len(dataset.ids("val")) == 79 and dataset.class_names[0] == "person" and dataset.folds.rule == "f+4v"
    for record in content["images"]:
        size = (record["height"], record["width"])
        expected = np.zeros(size, np.uint8)
        of_image = [a for a in content["annotations"] if a["image_id"] == record["id"]]
        for a in sorted(of_image, key=lambda a: -a["iscrowd"]):
            parts = a["segmentation"]
            whole = rle.frPyObjects(parts, *size)
            whole = rle.merge(whole) if isinstance(whole, list) else whole
            expected[rle.decode(whole) > 0] = 255 if a["iscrowd"] else rank[a["category_id"]]
        image_id = record["file_name"].removesuffix(".jpg")
        assert np.array_equal(dataset.label(image_id), expected)
        assert dataset.image(image_id).size == size[::-1]
