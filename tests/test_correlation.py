"""The fused correlation against the plain one, written out from Eq. 3 with the g^2 x g^2 tensor."""

import pytest
import torch
import torch.nn.functional as F

from fsdino.correlation import CorrelationPrior
from fsdino.prompts import mask_to_grid, masked_mean, prototype_similarity


def plain_prior(module, support, weights, query):
    """Shots are averaged after the first linear map; every correlation tensor exists."""
    batch, shots = support.shape[:2]
    reduced = []
    for k in range(shots):
        f_s = F.normalize(support[:, k], dim=1) * weights[:, k, None]
        f_q = F.normalize(query, dim=1)
        s4d = torch.einsum("bchw,bcxy->bxyhw", f_s, f_q)  # b Hq Wq Hs Ws
        as_image = s4d.flatten(3).permute(0, 3, 1, 2)  # support positions are channels
        reduced.append(module.support_reduce(as_image))
    prototype = torch.stack([masked_mean(support[:, k], weights[:, k]) for k in range(shots)]).mean(0)
    return module.decode(F.relu(torch.stack(reduced).mean(0)), prototype_similarity(prototype, query))


@pytest.mark.parametrize("grid", [4, 5, 9])
@pytest.mark.parametrize("shots", [1, 3])
def test_fused_correlation_equals_the_plain_one(grid, shots):
    torch.manual_seed(grid)
    module = CorrelationPrior(grid, channels=16).double()
    support, query = torch.randn(2, shots, 12, grid, grid).double(), torch.randn(2, 12, grid, grid).double()
    weights = mask_to_grid((torch.rand(2 * shots, 40, 40) > 0.5).double(), grid).unflatten(0, (2, shots))
    kernel = torch.stack([module.kernel(support[:, k], weights[:, k]) for k in range(shots)]).mean(0)
    prototype = torch.stack([masked_mean(support[:, k], weights[:, k]) for k in range(shots)]).mean(0)
    fused = module(kernel, query, prototype_similarity(prototype, query))
    expected = plain_prior(module, support, weights, query)
    assert fused.shape == (2, 1, 4 * grid, 4 * grid)
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-10)


def test_a_fresh_correlation_lets_the_decoder_see_the_support():
    """Under PyTorch's default start the prior varied by 0.009 within an image: training began blind."""
    torch.manual_seed(0)
    module = CorrelationPrior(9)
    late = torch.randn(4, 32, 9, 9)
    weights = mask_to_grid((torch.rand(4, 40, 40) > 0.5).float(), 9)
    prior = module(module.kernel(late, weights), late.flip(0), torch.zeros(4, 1, 9, 9))
    assert prior.std((1, 2, 3)).min() > 0.1


def test_positions_outside_the_mask_leave_no_trace():
    torch.manual_seed(0)
    module = CorrelationPrior(6, channels=8)
    late = torch.randn(1, 10, 6, 6)
    weights = torch.zeros(1, 6, 6)
    weights[:, 2:4, 2:4] = 1
    other = torch.where(weights[:, None] > 0, late, torch.randn_like(late))
    torch.testing.assert_close(module.kernel(late, weights), module.kernel(other, weights))
