"""Gated activations: y = act(gate) up, and plain ones where there is no ``up``.

    silu        g / (1 + exp(-g))
    gelu        g (1 + erf(g / sqrt(2))) / 2
    gelu_tanh   g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g³))) / 2
    relu2       max(g, 0)²

Sources: Shazeer, GLU Variants Improve Transformer (2020); Hendrycks and Gimpel, Gaussian Error
Linear Units (2016); So et al., Primer (2021).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu2": lambda g: F.relu(g).square(),
}


def glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """gate and up [..., I], or no up -> [..., I]."""
    y = ACTIVATIONS[activation](gate)
    return y if up is None else y * up


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """The gradients of gate and up."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
        y = glu(leaves[0], None if up is None else leaves[1], activation)
        dgate, *dup = torch.autograd.grad(y, leaves, dy)
    return dgate, dup[0] if dup else None
