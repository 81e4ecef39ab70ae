import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image

from fsdino.data.dataset import differing_sizes, open_dataset
from fsdino.data.inspection import inspect
from fsdino.data.masks import binary_label
from fsdino.data.protocols import HDMNET
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError


def test_a_binary_label_keeps_void():
    label = np.array([[0, 3, 5], [255, 3, 0]], np.uint8)
    assert binary_label(label, 3).tolist() == [[0, 1, 0], [255, 1, 0]]


def test_a_folder_of_another_layout_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="expected a data set, found none of these layouts: voc: JPEGImages"):
        open_dataset(str(tmp_path))


def test_an_unknown_class_in_a_label_is_a_users_mistake(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "copy")
    (root / "classes.txt").write_text("\n".join("abcdefgh"))
    with pytest.raises(UserError, match=r"expected classes 0 to 8 and 255, got [\d, ]+; correct the label"):
        VocDataset(root).class_pixels("train")


def test_class_pixels_follow_a_changed_label(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "copy")
    dataset = VocDataset(root)
    first = dataset.ids("val")[0]
    before = dataset.class_pixels("val")[first]
    Image.fromarray(np.full((224, 224), 9, np.uint8)).save(root / "SegmentationClassAug" / f"{first}.png")
    assert dataset.class_pixels("val")[first] == {9: 224 * 224} != before


def test_class_names_may_have_spaces_and_the_folder_names_the_data_set(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "street")
    (root / "classes.txt").write_text("traffic light\nstop sign\n")
    dataset = VocDataset(root)
    assert dataset.class_names == ["traffic light", "stop sign"] and dataset.name == "street"


def test_a_data_set_in_a_bucket_is_the_same_data_set(shapes_root, s3_endpoint):
    fsspec.filesystem("s3").put(str(shapes_root), "features/shapes", recursive=True)
    here, there = open_dataset(str(shapes_root)), open_dataset("s3://features/shapes")
    assert there.name == here.name == "shapes" and there.class_names == here.class_names
    assert HDMNET.training_images(there, 0) == HDMNET.training_images(here, 0)
    image_id = here.ids("train")[3]
    assert np.array_equal(there.image(image_id), here.image(image_id))
    assert np.array_equal(there.label(image_id), here.label(image_id))
    assert there.source(image_id) == f"s3://features/shapes/JPEGImages/{image_id}.jpg"


def copied(shapes_root, tmp_path):
    return shutil.copytree(shapes_root, tmp_path / "copy")


def test_photographs_of_other_kinds_are_found_by_their_names(tmp_path, shapes_root):
    root = copied(shapes_root, tmp_path)
    first, second = VocDataset(root).ids("val")[:2]
    folder = root / "JPEGImages"
    Image.open(folder / f"{first}.jpg").save(folder / f"{first}.png")
    (folder / f"{first}.jpg").unlink()
    (folder / f"{second}.jpg").rename(folder / f"{second}.JPEG")
    dataset = VocDataset(root)
    assert dataset.source(first).endswith(f"{first}.png") and dataset.source(second).endswith(f"{second}.JPEG")
    assert dataset.image(first).size == dataset.image(second).size == (224, 224)


def test_a_list_of_pairs_is_the_same_data_set(tmp_path, shapes_root):
    root = copied(shapes_root, tmp_path)
    ids = VocDataset(root).ids("val")
    pairs = "".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\r\n" for i in ids)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(pairs)
    assert VocDataset(root).ids("val") == ids
    assert VocDataset(root).list_digest("val") == VocDataset(shapes_root).list_digest("val")


def test_labels_of_another_size_than_their_photographs_are_refused_with_both(tmp_path, shapes_root):
    root = copied(shapes_root, tmp_path)
    dataset = VocDataset(root)
    turned, larger, right = dataset.ids("val")[:3]
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = Image.open(root / "JPEGImages" / f"{turned}.jpg").resize((224, 100))
    photograph.save(root / "JPEGImages" / f"{turned}.jpg", exif=exif)
    Image.open(root / "SegmentationClassAug" / f"{turned}.png").resize((224, 100), 0).save(
        root / "SegmentationClassAug" / f"{turned}.png"
    )
    Image.open(root / "SegmentationClassAug" / f"{larger}.png").resize((226, 224), 0).save(
        root / "SegmentationClassAug" / f"{larger}.png"
    )
    sizes = {i: dataset.image(i).size for i in (turned, larger, right)}
    expected = rf"{turned}\.png: .* 100x224 \(EXIF orientation 6\), got 224x100; 2 of 3 labels differ"
    with pytest.raises(UserError, match=expected):
        differing_sizes(dataset, "val", sizes)
    differing_sizes(dataset, "val", {right: sizes[right]})
    problems = inspect(dataset).problems
    assert [
        any(p.startswith(str(root / "SegmentationClassAug" / f"{i}.png")) for p in problems) for i in (turned, larger)
    ]
    assert len(problems) == 2


def test_an_inspection_lists_everything_that_is_wrong(tmp_path, shapes_root):
    root = copied(shapes_root, tmp_path)
    assert inspect(VocDataset(root)).problems == []
    train, val = (VocDataset(root).ids(split) for split in ("train", "val"))
    (root / "JPEGImages" / f"{train[0]}.jpg").write_bytes(b"broken")
    (root / "SegmentationClassAug" / f"{train[1]}.png").unlink()
    Image.fromarray(np.full((224, 224), 77, np.uint8)).save(root / "SegmentationClassAug" / f"{train[2]}.png")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("\n".join([*val, train[3]]))
    report = inspect(VocDataset(root))
    found = "\n".join(report.problems)
    for expected in (
        f"{train[0]}.jpg: expected a readable image",
        f"{train[1]}.png: expected an image file, found nothing there",
        f"{train[2]}.png: expected classes 0 to 12 and 255, got 77",
        f"1 images are in both lists (the first: {train[3]})",
    ):
        assert expected in found
    assert len(report.problems) == 4 and report.images == {"train": 120, "val": 41}
    (lists / "train_aug.txt").write_text("a -1\n")
    assert "train_aug.txt: expected ids of images" in "\n".join(inspect(VocDataset(root)).problems)


def test_an_inspection_names_folds_that_have_no_episodes(tmp_path, shapes_root):
    root = copied(shapes_root, tmp_path)
    (root / "classes.txt").write_text("\n".join("abcdefghijklm"))
    assert "class 13 would never be tested" in inspect(VocDataset(root)).problems[0]
    (root / "classes.txt").write_text("\n".join("abcdefghijklmnop"))
    found = inspect(VocDataset(root)).problems
    assert any("test: fold 3: expected images of its novel classes, got none at all" in line for line in found)
