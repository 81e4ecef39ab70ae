import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image

from fsdino.data.voc import VocDataset, binary_label
from fsdino.errors import UserError


def test_a_binary_label_keeps_void():
    label = np.array([[0, 3, 5], [255, 3, 0]], np.uint8)
    assert binary_label(label, 3).tolist() == [[0, 1, 0], [255, 1, 0]]


def test_a_folder_of_another_layout_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="found no ImageSets/Segmentation"):
        VocDataset(tmp_path)


def test_an_unknown_class_in_a_label_is_a_users_mistake(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "copy")
    (root / "classes.txt").write_text("\n".join("abcdefgh"))
    with pytest.raises(UserError, match=r"expected classes 0 to 8 and 255, got \d+; name further classes"):
        VocDataset(root).class_pixels("train")


def test_class_pixels_follow_a_changed_label(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "copy")
    dataset = VocDataset(root)
    first = dataset.ids("val")[0]
    before = dataset.class_pixels("val")[first]
    Image.fromarray(np.full((224, 224), 9, np.uint8)).save(root / "SegmentationClassAug" / f"{first}.png")
    assert dataset.class_pixels("val")[first] == {9: 224 * 224} != before


@pytest.mark.real_data
def test_the_test_folds_of_pascal_are_as_large_as_the_protocol_says(voc_root):
    dataset = VocDataset(voc_root)
    folds = [dataset.test_images(fold) for fold in range(4)]
    assert [len(images) for images in folds] == [364, 445, 592, 336]
    assert [sum(map(len, images.values())) for images in folds] == [365, 467, 734, 357]


@pytest.mark.real_data
def test_no_training_image_of_a_fold_holds_a_novel_pixel(voc_root):
    dataset = VocDataset(voc_root)
    pixels = dataset.class_pixels("train")
    for fold in range(4):
        novel = set(dataset.novel(fold))
        images = dataset.training_images(fold)
        assert len(images) > 500
        assert not any(novel & set(pixels[image_id]) for image_id in images)
        assert not set(images) & set(dataset.ids("val"))


def test_class_names_may_have_spaces_and_the_folder_names_the_data_set(tmp_path, shapes_root):
    root = shutil.copytree(shapes_root, tmp_path / "street")
    (root / "classes.txt").write_text("traffic light\nstop sign\n")
    dataset = VocDataset(root)
    assert dataset.class_names == ["traffic light", "stop sign"] and dataset.name == "street"


def test_a_data_set_in_a_bucket_is_the_same_data_set(shapes_root, s3_endpoint):
    fsspec.filesystem("s3").put(str(shapes_root), "features/shapes", recursive=True)
    here, there = VocDataset(shapes_root), VocDataset("s3://features/shapes")
    assert there.name == here.name == "shapes" and there.class_names == here.class_names
    assert there.training_images(0) == here.training_images(0)
    image_id = here.ids("train")[3]
    assert np.array_equal(there.image(image_id), here.image(image_id))
    assert np.array_equal(there.label(image_id), here.label(image_id))
    assert str(there.image_path(image_id)) == f"s3://features/shapes/JPEGImages/{image_id}.jpg"
