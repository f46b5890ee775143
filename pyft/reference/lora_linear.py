"""The LoRA linear: y = x Wᵀ + bias + scale (drop(x) Aᵀ) Bᵀ (Hu et al., LoRA, 2021)."""

from torch import Tensor
from torch.nn.functional import linear

from pyft.reference.dropout import dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R] or neither, bias [N] -> [..., N]."""
    y = linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    dropped = dropout(x, dropout_p, seed) if dropout_p > 0 else x
    return y + scale * linear(linear(dropped, lora_a), lora_b)
