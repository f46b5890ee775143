"""The linear over a decoded weight: y = x Wᵀ + bias, and the gradient of its input, dX = dY W."""

from torch import Tensor


def qlinear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K], W [N, K], bias [N] or None -> [M, N]."""
    y = x @ w.t()
    return y if bias is None else y + bias


def qlinear_input_gradient(dy: Tensor, w: Tensor) -> Tensor:
    """dY [M, N], W [N, K] -> [M, K]."""
    return dy @ w
