"""Ridge regression from one feature map to another: the linear map that a distilled adapter has to beat."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)


class RidgeRegression:
    """Fits `y = W x + b` at every position, from sums over batches of any number and any grid, in float64."""

    def __init__(self) -> None:
        self._inner: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, x: Float[Tensor, "b c g g"], y: Float[Tensor, "b e g g"]) -> None:
        """Take the positions of a batch into account."""
        rows = _with_one(x)
        inner, cross = rows.T @ rows, rows.T @ _rows(y)
        self._inner = inner if self._inner is None else self._inner + inner
        self._cross = cross if self._cross is None else self._cross + cross

    def solve(self, penalty: float) -> Float[Tensor, "d e"]:
        """Weights, and the bias in the last row. The penalty is relative to a mean channel's sum of squares."""
        assert self._inner is not None and self._cross is not None
        strength = torch.full_like(self._inner.diagonal(), penalty * self._inner.diagonal()[:-1].mean().item())
        strength[-1] = 0
        return torch.linalg.solve(self._inner + strength.diag(), self._cross)


def apply(weights: Float[Tensor, "d e"], x: Float[Tensor, "b c g g"]) -> Float[Tensor, "b e g g"]:
    """The fitted map at every position."""
    return (_with_one(x) @ weights).unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, 2).double()


def _with_one(x: Tensor) -> Tensor:
    return F.pad(_rows(x), (0, 1), value=1.0)
