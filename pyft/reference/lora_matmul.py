"""The product with a low-rank product beside it: x W + bias + scale S B."""

from torch import Tensor


def lora_matmul(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """x [M, K], W [K, N], S [M, R], B [R, N], bias [N] or None -> [M, N]."""
    y = x @ w + scale * (s @ b)
    return y if bias is None else y + bias
