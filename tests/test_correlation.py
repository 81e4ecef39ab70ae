"""The fused correlation against Eq. 3-5 written out position by position, and what each switch means."""

import pytest
import torch
import torch.nn.functional as F

from fsdino.correlation import CorrelationPrior
from fsdino.prompts import mask_to_grid, masked_mean, prototype_similarity


def written_out(module, support, weights, query, similarity, contrast, support_weights, similarity_scale):
    """The prior of one query, position by position from Eq. 3-5; only the layers' weights are the module's.

    `support` (k, c, g, g), `weights` (k, g, g), `query` (c, g, g), `similarity` (g, g).
    """
    layers = dict(module.named_parameters())
    g = query.shape[-1]
    h = -(-g // 2)
    first, bias = layers["support_reduce.weight"][:, :, 0, 0], layers["support_reduce.bias"]
    reduced = torch.zeros(len(first), g, g, dtype=query.dtype)
    for shot, mask in zip(support, weights, strict=True):
        counted = mask / mask.sum() if support_weights == "share" else mask
        if contrast:
            rest = 1 - mask
            counted = counted - (rest / rest.sum() if support_weights == "share" else rest)
        if support_weights == "share":
            counted = counted * g * g / 4
        for y in range(g):
            for x in range(g):
                cosines = torch.zeros(g * g, dtype=query.dtype)  # Eq. 3, of one query position with every support's
                for v in range(g):
                    for u in range(g):
                        a, b = query[:, y, x], shot[:, v, u]
                        cosines[v * g + u] = counted[v, u] * (a @ b) / (a.norm() * b.norm())
                reduced[:, y, x] += first @ cosines / len(support)
    reduced = torch.relu(reduced + bias[:, None, None])
    s1 = F.conv2d(reduced[None], layers["query_reduce.weight"], layers["query_reduce.bias"], stride=2, padding=1)[0]
    s1 = torch.relu(s1)  # (support positions, h, h): the query's axes are spatial
    total = torch.zeros_like(s1)
    for channel in range(h * h):  # Eq. 4: each support position's map by its own 3 x 3 kernel
        kernel = layers["depthwise.weight"][channel][None]
        total[channel] = F.conv2d(s1[channel][None, None], kernel, padding=1)[0, 0] + layers["depthwise.bias"][channel]
    mix, mix_bias = layers["pointwise.weight"][:, :, 0, 0], layers["pointwise.bias"]
    for position in range(h * h):  # Eq. 5: at each support position, query positions are mixed
        total[position] += (mix @ s1[position].flatten() + mix_bias).unflatten(0, (h, h))
    evidence = similarity
    if similarity_scale == "unit":
        evidence = evidence if contrast else evidence - evidence.mean()
        evidence = evidence / evidence.square().mean().sqrt()
    for y in range(h):  # area-resized to half the grid, and added to every channel
        for x in range(h):
            rows = slice(y * g // h, -(-(y + 1) * g // h))
            columns = slice(x * g // h, -(-(x + 1) * g // h))
            total[:, y, x] += evidence[rows, columns].mean()
    out = total[None]
    for layer, side in ((0, g), (1, 2 * g), (2, 4 * g)):
        out = F.conv2d(out, layers[f"head.{layer}.weight"], layers[f"head.{layer}.bias"], padding=1)
        out = torch.relu(out) if layer < 2 else out
        out = F.interpolate(out, size=(side, side), mode="bilinear", align_corners=False)
    return out[0]


@pytest.mark.parametrize(("grid", "shots"), [(4, 1), (5, 3)])
@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize(("support_weights", "scale"), [("mask", "cosine"), ("share", "unit")])
@torch.no_grad()
def test_the_prior_is_that_of_equations_3_to_5_written_out(grid, shots, contrast, support_weights, scale):
    torch.manual_seed(grid)
    module = CorrelationPrior(
        grid, channels=16, contrast=contrast, support_weights=support_weights, similarity=scale
    ).double()
    for parameter in module.parameters():  # biases start at zero
        parameter += 0.1 * torch.randn_like(parameter)
    support, query = torch.randn(2, shots, 12, grid, grid).double(), torch.randn(2, 12, grid, grid).double()
    weights = mask_to_grid((torch.rand(2 * shots, 40, 40) > 0.5).double(), grid).unflatten(0, (2, shots))
    kernel = torch.stack([module.kernel(support[:, k], weights[:, k]) for k in range(shots)]).mean(0)
    similarity = torch.rand(2, 1, grid, grid).double()
    fused = module(kernel, query, similarity)
    for b in range(2):
        expected = written_out(
            module, support[b], weights[b], query[b], similarity[b, 0], contrast, support_weights, scale
        )
        torch.testing.assert_close(fused[b], expected, rtol=1e-9, atol=1e-9)


def fresh_prior(start):
    """Logits of a fresh module for supports and queries that show two classes each."""
    torch.manual_seed(0)
    module = CorrelationPrior(9, start=start)
    weights = torch.zeros(4, 9, 9)
    weights[:, 2:6, 3:7] = 1
    of_class, of_rest = torch.randn(2, 4, 32, 1, 1)
    late = torch.where(weights[:, None] > 0, of_class, of_rest) + 0.5 * torch.randn(4, 32, 9, 9)
    similarity = prototype_similarity(masked_mean(late, weights), late)
    return module(module.kernel(late, weights), late, similarity)


def test_a_fresh_correlation_lets_the_decoder_see_the_support_only_with_hes_start():
    """Why `paper` departs here: with PyTorch's start the prior is the same all over the image, it begins blind."""
    assert fresh_prior("he").std((1, 2, 3)).min() > 0.1
    assert fresh_prior("pytorch").std((1, 2, 3)).max() < 0.02


def test_positions_outside_the_mask_leave_no_trace():
    torch.manual_seed(0)
    module = CorrelationPrior(6, channels=8)
    late = torch.randn(1, 10, 6, 6)
    weights = torch.zeros(1, 6, 6)
    weights[:, 2:4, 2:4] = 1
    other = torch.where(weights[:, None] > 0, late, torch.randn_like(late))
    torch.testing.assert_close(module.kernel(late, weights), module.kernel(other, weights))


def test_shares_have_one_total_whatever_the_size_of_the_object_and_masks_do_not():
    weights = torch.zeros(2, 4, 4)
    weights[0, 0, 0], weights[1, :2] = 0.5, 1
    plain = CorrelationPrior(4, channels=8)
    torch.testing.assert_close(plain.position_weights(weights), weights)  # Eq. 3: the mask, no more
    masked = CorrelationPrior(4, channels=8, support_weights="share").position_weights(weights)
    torch.testing.assert_close(masked.sum((1, 2)), torch.full((2,), 4.0))
    against = CorrelationPrior(4, channels=8, contrast=True, support_weights="share").position_weights(weights)
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
