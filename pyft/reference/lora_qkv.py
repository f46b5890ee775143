"""Three LoRA linears of one input and one dropout mask: q, k and v (Hu et al., LoRA, 2021)."""

from collections.abc import Sequence

from torch import Tensor

from pyft.reference.lora_linear import lora_linear

Projection = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]


def lora_qkv(
    x: Tensor, projections: Sequence[Projection], dropout_p: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """x [..., K] and a (weight, bias, lora_a, lora_b, scale) each -> [..., N_i] each."""
    return [
        lora_linear(x, weight, lora_a, lora_b, scale, bias, dropout_p, seed)
        for weight, bias, lora_a, lora_b, scale in projections
    ]
