"""What `predict` writes, read by the tools it is for, or by parsers of our own that share no code with the writers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scipy import ndimage

from fsdino.errors import UserError
from pipelines import panels
from pipelines.outputs import Found, outline, parts, stems, writers

HEIGHT, WIDTH = 60, 90
NAMES = ["cat", "left dog"]


def drawn():
    """Two discs of the first class, and a ring with a hole of the second that covers part of one."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    discs = ((x - 20) ** 2 + (y - 20) ** 2 < 150) | ((x - 70) ** 2 + (y - 45) ** 2 < 200)
    radius = (x - 70) ** 2 + (y - 35) ** 2
    ring = (radius < 400) & (radius > 100)
    return np.stack([discs, ring])


@pytest.fixture
def found():
    masks = drawn()
    logits = np.where(masks, np.array([2.0, 3.0])[:, None, None], -4.0).astype(np.float32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return Found("photos/a.jpg", "a", image, logits, np.array([0.88, 0.95]), np.zeros(2))


def written(found, tmp_path, *formats, instances=False, times=1):
    made = writers(formats, tmp_path, NAMES, instances)
    for writer in made:
        for _ in range(times):
            writer.add(found)
        writer.close()
    paths = [path for writer in made for path in (*writer.paths(found.stem), *writer.shared)]
    assert sorted(paths) == sorted(tmp_path.iterdir())
    return [path for writer in made for path in writer.paths(found.stem)], [p for w in made for p in w.shared]


def test_a_mask_of_each_class_is_black_and_white(found, tmp_path):
    (cat, dog), _ = written(found, tmp_path, "mask")
    assert (cat.name, dog.name) == ("a_cat.png", "a_left_dog.png")
    for path, mask in zip((cat, dog), drawn(), strict=True):
        assert np.array_equal(np.array(Image.open(path)), mask * 255)


def test_one_picture_of_labels_gives_each_pixel_to_the_surer_class(found, tmp_path):
    (path,), _ = written(found, tmp_path, "labels")
    with Image.open(path) as picture:
        assert picture.mode == "P"
        values, colours = np.array(picture), np.array(picture.convert("RGB"))
    cat, dog = drawn()
    assert np.array_equal(values, np.where(dog, 2, np.where(cat, 1, 0)))
    assert (colours[values == 0] == 0).all() and (cat & dog).any()
    assert len({tuple(c) for c in colours[values > 0]}) == 2


def test_probabilities_have_16_bits(found, tmp_path):
    (path, _), _ = written(found, tmp_path, "probability")
    values = np.array(Image.open(path)).astype(float) / 65535
    assert np.array(Image.open(path)).dtype == np.uint16
    expected = 1 / (1 + np.exp(-found.logits[0].astype(float)))
    assert np.abs(values - expected).max() < 1e-5


@pytest.mark.parametrize("instances, number", [(False, 2), (True, 3)])
def test_pycocotools_reads_the_masks_boxes_and_areas(found, tmp_path, instances, number):
    _, (path,) = written(found, tmp_path, "coco", instances=instances, times=2)
    read = COCO(str(path))
    assert [c["name"] for c in read.loadCats(read.getCatIds())] == NAMES and len(read.getImgIds()) == 2
    for image_id in read.getImgIds():
        listed = read.loadAnns(read.getAnnIds(image_id))
        assert len(listed) == number
        for class_id, mask in enumerate(drawn(), start=1):
            of_class = [a for a in listed if a["category_id"] == class_id]
            decoded = np.any([read.annToMask(a) for a in of_class], axis=0)
            assert np.array_equal(decoded, mask)
            for one in of_class:
                rows, columns = np.nonzero(read.annToMask(one))
                x, y, width, height = one["bbox"]
                box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
                assert (x, y, width, height) == box and one["area"] == len(rows)
                assert one["score"] == pytest.approx(1 / (1 + np.exp([-2, -3][class_id - 1])), abs=1e-6)


def test_results_are_what_coco_evaluation_takes(found, tmp_path):
    _, (path,) = written(found, tmp_path, "coco", instances=True)
    truth, record = COCO(str(path)), json.loads(path.read_text())
    assert len(truth.loadRes(record["annotations"]).anns) == 3


def test_outlines_of_yolo_drawn_anew_are_the_masks_without_their_holes(found, tmp_path):
    (path,), (classes,) = written(found, tmp_path, "yolo")
    assert classes.read_text() == "cat\nleft dog\n"
    drawn_anew = np.zeros((2, HEIGHT, WIDTH), bool)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        number, *shares = line.split(" ")
        points = np.array(shares, float).reshape(-1, 2)
        assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
        large = Image.new("1", (8 * WIDTH, 8 * HEIGHT))
        ImageDraw.Draw(large).polygon([tuple(p) for p in points * (8 * WIDTH, 8 * HEIGHT)], fill=1)
        drawn_anew[int(number)] |= np.array(large)[4::8, 4::8]
    cat, ring = drawn()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    filled = ring | ((x - 70) ** 2 + (y - 35) ** 2 <= 100)
    for anew, mask in zip(drawn_anew, (cat, filled), strict=True):
        assert (anew & mask).sum() / (anew | mask).sum() > 0.97


def test_an_outline_of_a_rectangle_at_the_border_follows_its_sides():
    part = np.zeros((10, 20), bool)
    part[6:, 15:] = True
    ((place, cut),) = parts(part, instances=True)
    points = outline(place, cut, part.shape) * (20, 10)
    assert points[:, 0].min() == 15 and points[:, 0].max() == 20 and points[:, 1].max() == 10
    assert points[:, 1].min() == 6


@pytest.mark.parametrize("lag", [1.5, 9.0])
def test_a_class_that_is_less_probable_keeps_the_pixels_that_no_other_claims(found, lag):
    cat, dog = drawn()
    behind = replace(found, lag=np.array([0.0, lag]))  # the dog's 3 is less than the cat's 2 by then
    assert np.array_equal(behind.labels, np.where(cat, 1, np.where(dog, 2, 0)))


def test_a_class_that_is_nowhere_has_no_object_and_a_line_for_nothing(tmp_path):
    logits, none = np.full((2, 6, 8), -1, np.float32), np.zeros(2)
    nothing = Found("b.jpg", "b", Image.new("RGB", (8, 6)), logits, none, none)
    files, (annotations, _) = written(nothing, tmp_path, "mask", "labels", "overlay", "coco", "yolo")
    assert json.loads(annotations.read_text())["annotations"] == [] and (tmp_path / "b.txt").read_text() == ""
    assert not np.array(Image.open(tmp_path / "b_labels.png")).any() and all(path.exists() for path in files)
    assert not [*parts(np.zeros((3, 3), bool), instances=True), *parts(np.zeros((3, 3), bool), instances=False)]


def test_an_overlay_tints_the_masks_outlines_them_and_leaves_the_rest(found):
    cat, dog = drawn()
    bare = np.array(panels.overlaid(found.image, found.apart, ["", ""]), float)
    before = np.array(found.image, float)
    captions = np.zeros((HEIGHT, WIDTH), bool)  # of nothing: small boxes over each mask
    for mask in found.apart:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        captions[max(0, rows[0] - 12) : rows[0] + 12, columns[0] : columns[0] + 12] = True
    assert np.array_equal(bare[~(cat | dog | captions)], before[~(cat | dog | captions)])
    for number, mask in enumerate(found.apart):
        inside = ndimage.binary_erosion(mask, iterations=3) & ~captions
        tinted = (1 - panels.TINT) * before + panels.TINT * np.array(panels.COLOURS[number])
        assert inside.any() and np.abs(bare[inside] - tinted[inside]).max() <= 1
        edge = mask & ~ndimage.binary_erosion(mask, border_value=1) & ~captions
        assert (bare[edge] == panels.COLOURS[number]).all()
    captioned = np.array(panels.overlaid(found.image, found.apart, ["cat 0.88", "dog 0.95"]), float)
    assert not np.array_equal(captioned, bare)


def test_label_pictures_of_many_classes_keep_their_numbers(tmp_path):
    names = [f"class {n}" for n in range(20)]
    logits = np.full((20, 5, 20), -1, np.float32)
    for n in range(20):
        logits[n, :, n] = 1
    writer = writers(["labels"], tmp_path, names, False)[0]
    writer.add(Found("a.jpg", "a", Image.new("RGB", (20, 5)), logits, np.ones(20), np.zeros(20)))
    with Image.open(tmp_path / "a_labels.png") as picture:
        assert np.array_equal(np.array(picture)[0], np.arange(1, 21))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat", "cat"], "--class cat: a class called cat is there already"),
        (["a/b", "a b"], "--class a b: a class called a/b is there already"),
        (["cat", " "], "expected a name in one line"),
    ],
)
def test_classes_whose_files_could_not_be_told_apart_are_refused(names, said, tmp_path):
    with pytest.raises(UserError, match=said):
        writers(["mask"], tmp_path, names, False)


def test_nothing_that_is_written_replaces_an_input_or_another_file(tmp_path):
    two = writers(["mask", "labels", "coco"], tmp_path, ["cat", "labels"], False)
    with pytest.raises(UserError, match="--format: two of them write a_labels"):
        stems(["a.jpg"], two, [], [])
    made = writers(["mask", "coco"], tmp_path, ["cat", "dog"], False)
    assert stems(["a.jpg", "b/a.jpg", "a_cat.jpg"], made, [], []) == ["a", "a-2", "a_cat"]
    for given in ("a_cat.png", "annotations.json", "panel.png"):
        with pytest.raises(UserError, match=f"would overwrite the input .*{given}"):
            stems(["a.jpg"], made, [tmp_path / "panel.png"], [str(tmp_path / given)])
    only_coco = writers(["coco"], tmp_path, ["cat"], False)
    assert stems(["a.png"], only_coco, [], [str(tmp_path / "a.png")]) == ["a"]
