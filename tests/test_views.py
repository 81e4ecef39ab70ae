import numpy as np
from PIL import Image

from fsdino.data.views import View, draw_view


def test_view_zero_is_the_photograph_itself():
    assert draw_view(3, "image", 0) == View()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    assert np.array_equal(View().image(image), image)


def test_a_view_depends_on_seed_image_and_number_alone():
    assert draw_view(0, "a", 1) == draw_view(0, "a", 1)
    drawn = {draw_view(seed, name, number) for seed in (0, 1) for name in "abcdefgh" for number in (1, 2, 3)}
    assert len(drawn) > 20


def test_draws_are_hdmnets_half_of_each_and_ten_degrees_at_most():
    views = [draw_view(0, f"image{i}", 1) for i in range(2000)]
    for share in (
        np.mean([v.flip for v in views]),
        np.mean([v.blur for v in views]),
        np.mean([v.angle_deg != 0 for v in views]),
    ):
        assert abs(share - 0.5) < 0.04
    assert 9 < max(abs(v.angle_deg) for v in views) <= 10


def test_image_and_label_are_turned_and_flipped_alike():
    label = np.zeros((80, 80), np.uint8)
    label[10:30, 50:75] = 7
    image = Image.fromarray(np.repeat(label[..., None] * 30, 3, axis=2))
    view = View(angle_deg=8.0, flip=True)
    warped, expected = np.asarray(view.image(image))[..., 0] > 105, view.label(label, 80)
    agree = (warped == (expected == 7))[expected != 255]
    assert agree.mean() > 0.99 and (expected == 7).sum() > 400


def test_corners_that_a_rotation_uncovers_are_void():
    label = View(angle_deg=10.0).label(np.zeros((100, 100), np.uint8), 50)
    assert label[0, 0] == 255 and label[25, 25] == 0
