"""The fused correlation against the plain one, written out from Eq. 3 with the g^2 x g^2 tensor."""

import pytest
import torch
import torch.nn.functional as F

from fsdino.correlation import CorrelationPrior
from fsdino.prompts import mask_to_grid, masked_mean, prototype_similarity


def plain_prior(module, support, weights, query):
    """Shots are averaged after the first linear map; every correlation tensor exists."""
    shots = support.shape[1]
    reduced = []
    for k in range(shots):
        f_s = F.normalize(support[:, k], dim=1) * module.position_weights(weights[:, k])[:, None]
        f_q = F.normalize(query, dim=1)
        s4d = torch.einsum("bchw,bcxy->bxyhw", f_s, f_q)  # b Hq Wq Hs Ws
        as_image = s4d.flatten(3).permute(0, 3, 1, 2)  # support positions are channels
        reduced.append(module.support_reduce(as_image))
    prototype = torch.stack([masked_mean(support[:, k], weights[:, k]) for k in range(shots)]).mean(0)
    return module.decode(F.relu(torch.stack(reduced).mean(0)), prototype_similarity(prototype, query))


@pytest.mark.parametrize("grid", [4, 5, 9])
@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("contrast", [False, True])
def test_fused_correlation_equals_the_plain_one(grid, shots, contrast):
    torch.manual_seed(grid)
    module = CorrelationPrior(grid, channels=16, contrast=contrast).double()
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
    weights = torch.zeros(4, 9, 9)
    weights[:, 2:6, 3:7] = 1
    of_class, of_rest = torch.randn(2, 4, 32, 1, 1)
    late = torch.where(weights[:, None] > 0, of_class, of_rest) + 0.5 * torch.randn(4, 32, 9, 9)
    similarity = prototype_similarity(masked_mean(late, weights), late)
    prior = module(module.kernel(late, weights), late, similarity)
    assert prior.std((1, 2, 3)).min() > 0.1


def test_positions_outside_the_mask_leave_no_trace():
    torch.manual_seed(0)
    module = CorrelationPrior(6, channels=8)
    late = torch.randn(1, 10, 6, 6)
    weights = torch.zeros(1, 6, 6)
    weights[:, 2:4, 2:4] = 1
    other = torch.where(weights[:, None] > 0, late, torch.randn_like(late))
    torch.testing.assert_close(module.kernel(late, weights), module.kernel(other, weights))


def test_position_weights_have_one_total_whatever_the_size_of_the_object():
    weights = torch.zeros(2, 4, 4)
    weights[0, 0, 0], weights[1, :2] = 0.5, 1
    masked = CorrelationPrior(4, channels=8).position_weights(weights)
    torch.testing.assert_close(masked.sum((1, 2)), torch.full((2,), 4.0))
    against = CorrelationPrior(4, channels=8, contrast=True).position_weights(weights)
    torch.testing.assert_close(against[1, 0, 0], torch.tensor(0.5))
    torch.testing.assert_close(against[1, 3, 0], torch.tensor(-0.5))
    torch.testing.assert_close(against.sum((1, 2)), torch.zeros(2), atol=1e-6, rtol=0)


def test_other_grids_of_support_and_query_are_taken():
    torch.manual_seed(0)
    module = CorrelationPrior(6, channels=8)
    late, query = torch.randn(2, 10, 9, 9), torch.randn(2, 10, 13, 13)
    weights = mask_to_grid((torch.rand(2, 40, 40) > 0.5).float(), 9)
    kernel = module.kernel(late, weights)
    similarity = prototype_similarity(masked_mean(late, weights), query)
    assert module(kernel, query, similarity).shape == (2, 1, 52, 52)
    smaller = [F.interpolate(x, size=(6, 6), mode="bilinear", antialias=True) for x in (late, weights[:, None])]
    torch.testing.assert_close(kernel, module.kernel(smaller[0], smaller[1][:, 0]))


def test_a_larger_query_of_constant_features_has_the_prior_of_a_smaller_one():
    torch.manual_seed(0)
    module = CorrelationPrior(6, channels=8)
    kernel, feature = torch.randn(1, 8, 10), torch.randn(1, 10, 1, 1)
    priors = [module(kernel, feature.expand(1, 10, g, g), torch.ones(1, 1, g, g)) for g in (6, 12)]
    torch.testing.assert_close(F.interpolate(priors[1], scale_factor=0.5, mode="area"), priors[0], atol=0.05, rtol=0.1)
