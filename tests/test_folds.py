import pytest

from fsdino.data.folds import base_images, novel_classes, novel_images
from fsdino.errors import UserError

PIXELS = {"a": {1: 5000}, "b": {1: 100, 6: 9000}, "c": {6: 2047, 7: 2048}, "d": {2: 3000, 3: 2048}, "e": {}}


def test_pascal_folds_are_consecutive_blocks_of_five():
    assert [novel_classes(f, 20) for f in range(4)] == [list(range(5 * f + 1, 5 * f + 6)) for f in range(4)]


def test_a_fold_that_does_not_exist_is_a_users_mistake():
    with pytest.raises(UserError, match="--fold 4: expected 0 to 3"):
        novel_classes(4, 20)


def test_an_image_with_a_single_novel_pixel_does_not_train():
    assert base_images(PIXELS, novel_classes(0, 20), 2048) == {"c": [7]}
    assert base_images(PIXELS, novel_classes(0, 20), 2048, keep_novel=True) == {"b": [6], "c": [7]}


def test_a_class_counts_from_2048_pixels():
    assert novel_images(PIXELS, novel_classes(0, 20), 2048) == {"a": [1], "d": [2, 3]}
    assert novel_images(PIXELS, novel_classes(1, 20), 2048) == {"b": [6], "c": [7]}
