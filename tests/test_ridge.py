"""Ridge regression on feature maps."""

import numpy as np
import pytest
import torch

from fsdino.ridge import RidgeRegression, apply


def test_a_linear_map_is_found_again_from_several_batches_and_grids():
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def target(x):
        return torch.einsum("ec,bchw->behw", weight, x.double()) + bias[:, None, None]

    fit = RidgeRegression()
    for batch, grid in ((2, 4), (3, 6)):
        x = torch.randn(batch, 3, grid, grid)
        fit.add(x, target(x))
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(apply(fit.solve(0.0), x), target(x), atol=1e-10)


def test_the_penalty_is_that_of_the_closed_form_and_spares_the_bias():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((36, 3)), rng.standard_normal((36, 2)) + 7
    fit = RidgeRegression()
    fit.add(torch.tensor(x.T.reshape(1, 3, 6, 6)), torch.tensor(y.T.reshape(1, 2, 6, 6)))
    design = np.hstack([x, np.ones((36, 1))])
    strength = 0.1 * (x**2).sum(0).mean() * np.diag([1, 1, 1, 0])
    expected = np.linalg.solve(design.T @ design + strength, design.T @ y)
    assert fit.solve(0.1).numpy() == pytest.approx(expected)
