import numpy as np
import pytest
from PIL import Image

from fsdino.data.masks import read_label, read_mask
from fsdino.encoder import to_input
from fsdino.errors import UserError
from fsdino.preprocess import read_image, resize_square


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    return path


def save(path, array, mode=None):
    Image.fromarray(array, mode=mode).save(path)
    return path


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg: expected an image file, found nothing"):
        read_image(tmp_path / "nowhere.jpg")


def test_text_named_jpg_is_a_users_mistake(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(UserError, match="expected a readable image"):
        read_image(tmp_path / "text.jpg")


def test_a_truncated_image_is_a_users_mistake(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / "whole.jpg", noise).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.jpg: expected a readable image, got: .*truncated"):
        read_image(tmp_path / "half.jpg")


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)


def test_a_mask_of_another_size_is_a_users_mistake(tmp_path):
    path = save(tmp_path / "mask.png", np.ones((10, 10), np.uint8))
    with pytest.raises(UserError, match="expected a mask of the photograph's size 30x20, got 10x10"):
        read_mask(path, (30, 20))


def test_an_empty_mask_is_a_users_mistake(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(UserError, match="expected at least one foreground pixel"):
        read_mask(path, (30, 20))


def test_a_label_of_a_palette_gives_its_indices(tmp_path):
    label = np.array([[0, 5], [20, 255]], np.uint8)
    image = Image.fromarray(label, mode="P")
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "label.png")
    assert np.array_equal(read_label(tmp_path / "label.png"), label)


def test_input_is_scaled_then_normalised(photo):
    pixels = resize_square(read_image(photo), 8)[None].copy()
    pixels[...] = 51
    x = to_input(pixels, (0.1, 0.2, 0.3), (0.5, 0.25, 0.1))
    assert x.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(x[0, :, 0, 0], [0.2, 0.0, -1.0], atol=1e-6)
