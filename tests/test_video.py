"""J and F against masks with known answers, and against the published definitions in other words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from fsdino.video import boundary_f, jaccard, outline, share_pixels, statistics


def square(top, left, side=20, size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_j_is_intersection_over_union_and_1_of_two_empty_masks():
    assert jaccard(square(10, 10), square(10, 10)) == 1
    assert jaccard(square(10, 10), square(10, 20)) == pytest.approx(200 / 600)
    assert jaccard(square(10, 10), square(0, 0, 0)) == 0 and jaccard(square(0, 0, 0), square(0, 0, 0)) == 1


def test_an_outline_is_where_the_right_the_lower_or_the_lower_right_pixel_differs():
    found = outline(np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool))
    expected = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert found.astype(int).tolist() == expected
    assert not outline(np.ones((3, 4), bool)).any()


def test_f_forgives_a_shift_of_a_pixel_but_not_one_of_many():
    # The diagonal is 100 px, so boundaries match within 1 px.
    assert boundary_f(square(10, 10), square(10, 10)) == 1 == boundary_f(square(10, 10), square(11, 10))
    # Ten to the right: of each outline of 80 pixels (21 rows and columns, two shared corners off) the parts of the
    # upper and lower edge that both have, and one pixel more at each inner end, match.
    assert boundary_f(square(10, 10), square(10, 20)) == pytest.approx(np.mean(_near(square(10, 10), square(10, 20))))
    assert boundary_f(square(0, 0, 0), square(10, 10)) == 0 == boundary_f(square(10, 10), square(0, 0, 0))
    assert boundary_f(square(0, 0, 0), square(0, 0, 0)) == 1


def _near(guess, truth):
    """Which of one outline's pixels are within one of the other, by neighbours looked at one by one."""
    other = {tuple(p) for p in np.argwhere(outline(truth))}
    steps = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
    return [any((y + dy, x + dx) in other for dy, dx in steps) for y, x in np.argwhere(outline(guess))]


def published_f(guess, truth):
    """The organisers' formula with dilations by a disk."""
    reach = int(np.ceil(0.008 * np.linalg.norm(guess.shape)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = y**2 + x**2 <= reach**2
    drawn = []
    for mask in (guess, truth):
        e, s, se = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
        e[:, :-1], s[:-1], se[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        b = mask ^ e | mask ^ s | mask ^ se
        b[-1], b[:, -1] = mask[-1] ^ e[-1], mask[:, -1] ^ s[:, -1]
        b[-1, -1] = False
        drawn.append(b)
    g, t = drawn
    if not g.any() or not t.any():
        return float(g.any() == t.any())
    precision, recall = (g & binary_dilation(t, disk)).sum() / g.sum(), (t & binary_dilation(g, disk)).sum() / t.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 150), st.integers(2, 150))
def test_f_is_the_organisers_on_random_masks(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = rng.random((2, -(-height // 9), -(-width // 9))) < rng.random()
    guess, truth = coarse.repeat(9, 1).repeat(9, 2)[:, :height, :width]
    assert boundary_f(guess, truth) == pytest.approx(published_f(guess, truth), abs=1e-12)


def test_decay_compares_the_first_quarter_with_the_last():
    found = statistics([1.0] * 4 + [0.8] * 4 + [0.4] * 4 + [0.0] * 4)
    assert found.mean == pytest.approx(0.55) and found.recall == 0.5
    # Ends at frames 1, 5, 9, 12 and 16: quarters share them, so the first holds one frame of the second.
    assert found.decay == pytest.approx(4.8 / 5 - 0.4 / 5)


def test_several_objects_share_the_pixels_by_the_largest_logit_above_0():
    logits = np.array([[[1.0, -1.0, 2.0, -3.0]], [[2.0, -2.0, 1.0, 0.5]]])
    assert share_pixels(logits).tolist() == [[2, 0, 1, 2]]
