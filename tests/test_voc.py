import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image

from fsdino.data.dataset import open_dataset
from fsdino.data.masks import binary_label
from fsdino.data.protocols import HDMNET
from fsdino.data.voc import VocDataset
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
