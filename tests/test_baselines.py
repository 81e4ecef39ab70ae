"""The training-free segmenters against their rules written out position by position."""

import pytest
import torch
import torch.nn.functional as F

from fsdino.baselines import TOP_K, nearest_logits, prototype_logits, two_prototype_logits

GRID = 6


def episode(shots=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    late = torch.randn(2, shots, 8, GRID, GRID, generator=generator)
    masks = torch.zeros(2, shots, GRID, GRID)
    masks[:, :, 1:4, 2:5] = 1
    return late, masks, torch.randn(2, 8, GRID, GRID, generator=generator)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("shots", [1, 2])
def test_prototypes_are_means_over_all_shots(shots):
    late, masks, query = episode(shots)
    contrast, prototype = two_prototype_logits(late, masks, query), prototype_logits(late, masks, query)
    for b in range(2):
        inside = torch.stack(
            [late[b, k, :, y, x] for k in range(shots) for y in range(1, 4) for x in range(2, 5)]
        ).mean(0)
        rest = [
            late[b, k, :, y, x] for k in range(shots) for y in range(GRID) for x in range(GRID) if not masks[b, k, y, x]
        ]
        outside = torch.stack(rest).mean(0)
        similarity = torch.tensor([[cosine(inside, query[b, :, y, x]) for x in range(GRID)] for y in range(GRID)])
        against = torch.tensor([[cosine(outside, query[b, :, y, x]) for x in range(GRID)] for y in range(GRID)])
        length = (F.normalize(inside, dim=0) - F.normalize(outside, dim=0)).norm()
        torch.testing.assert_close(contrast[b, 0], (similarity - against) / length, atol=1e-5, rtol=1e-4)
        stretched = (similarity - similarity.min()) / (similarity.max() - similarity.min())
        torch.testing.assert_close(prototype[b, 0], stretched - 0.5, atol=1e-5, rtol=1e-4)


def test_nearest_neighbours_are_the_five_best_on_either_side():
    late, masks, query = episode()
    logits = nearest_logits(late, masks, query)
    for b, y, x in [(0, 0, 0), (1, 3, 2), (1, 5, 5)]:
        sides = ([], [])
        for k in range(2):
            for i in range(GRID):
                for j in range(GRID):
                    sides[int(masks[b, k, i, j])].append(cosine(late[b, k, :, i, j], query[b, :, y, x]))
        background, foreground = (sum(sorted(side)[-TOP_K:]) / TOP_K for side in sides)
        assert logits[b, 0, y, x].item() == pytest.approx(foreground - background, abs=1e-5)


def test_an_object_smaller_than_five_cells_still_has_five_neighbours():
    late, masks, query = episode(shots=1)
    masks.zero_()
    masks[:, :, 2, 2] = 1
    assert torch.isfinite(nearest_logits(late, masks, query)).all()
    assert nearest_logits(late, masks, query).abs().max() < 2
