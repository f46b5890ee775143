"""Products with one thin side: S = scale drop(x) Aᵀ and dA = scale Sᵀ drop(x)."""

from torch import Tensor

from pyft.reference.dropout import dropout


def project(x: Tensor, a: Tensor, scale: float = 1.0, p: float = 0.0, seed: int = 0) -> Tensor:
    """x [M, K], A [R, K] -> [M, R]."""
    return scale * (dropout(x, p, seed) if p > 0 else x) @ a.t()


def reduce(s: Tensor, x: Tensor, scale: float = 1.0, p: float = 0.0, seed: int = 0) -> Tensor:
    """S [M, R], x [M, K] -> [R, K]."""
    return scale * s.t() @ (dropout(x, p, seed) if p > 0 else x)
