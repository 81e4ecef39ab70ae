"""Pictures show masks as they are scored, and the photograph as it is."""

import numpy as np
from PIL import Image

from pipelines import panels

SIDE = panels.CELL_PX
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8))


def changed(mask):
    return (np.asarray(panels.overlay(PHOTO, mask)) != np.asarray(PHOTO)).any(-1)


def test_pixels_outside_the_mask_are_those_of_the_photograph_and_inside_none_is():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[40:100, 60:90] = 1
    assert np.array_equal(changed(mask), mask > 0)


def test_the_outline_is_the_masks_colour_and_the_inside_a_tint():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[40:100, 60:90] = 1
    shown = np.asarray(panels.overlay(PHOTO, mask)).astype(float)
    assert (shown[40, 60:90] == panels.MASK_COLOUR).all() and (shown[41:99, 60] == panels.MASK_COLOUR).all()
    tint = (1 - panels.TINT) * np.asarray(PHOTO, float) + panels.TINT * panels.MASK_COLOUR
    np.testing.assert_allclose(shown[50:90, 64:86], tint[50:90, 64:86], atol=1)


def test_logits_are_enlarged_bilinearly_so_that_slanted_borders_have_no_stairs():
    y, x = np.mgrid[:32, :32].astype(np.float32)
    mask = changed((x - y + 3.3).astype(np.float32))  # above 0 on one side of a diagonal
    row, column = np.mgrid[:SIDE, :SIDE]
    scale = SIDE / 32
    exact = ((column + 0.5) / scale - (row + 0.5) / scale + 3.3) > 0
    inner = (slice(8, -8), slice(8, -8))  # at the image's border bilinear enlarging repeats the last value
    assert (mask != exact)[inner].mean() < 0.002
