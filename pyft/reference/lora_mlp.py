"""The gated MLP of LoRA linears: y = down(act(gate(x)) up(x)) (Shazeer, GLU Variants, 2020)."""

from torch import Tensor

from pyft.reference.glu import glu
from pyft.reference.lora_qkv import Projection, lora_qkv


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection | None,
    down: Projection,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """x [..., K] -> [..., K']; without ``up`` the gate's rows are the gate's and then up's. The
    mask of down's input is that of seed + 1.
    """
    if up is None:
        (both,) = lora_qkv(x, [gate], dropout_p, seed)
        g, u = both.chunk(2, -1)
    else:
        g, u = lora_qkv(x, [gate, up], dropout_p, seed)
    (y,) = lora_qkv(glu(g, u, activation), [down], dropout_p, seed + 1)
    return y
