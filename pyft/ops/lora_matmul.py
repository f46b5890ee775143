"""The product of activations and a weight with an adapter's low-rank product beside it.

    out = x W + bias + scale drop(S B)  x [M, K]   W [K, N]   S [M, R]   B [R, N]

There are three ways, and which one runs is data:

    augmented   one vendor matmul [x | S] [W ; scale B], where x lies in a buffer with room for S
                and W is decoded into a scratch with room for scale B: no pass over out besides
    epilogue    a Triton matmul that starts from scale S B: no pass besides either
    addmm       the vendor's matmul, then the low-rank product added in a pass over out
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.backend import device_guard, implementation, prefers_triton
from pyft.ops.dropout import NO_DROPOUT, Dropout
from pyft.ops.shared.matmul import mm

# Where ``auto`` takes the Triton matmul: device type -> dtypes. None was measured on a GPU yet.
EPILOGUE: dict[str, tuple[torch.dtype, ...]] = {}


@dataclass(frozen=True)
class LowRank:
    """scale drop(S B); S [M, R] and B [R, N] of any strides."""

    s: Tensor
    b: Tensor
    scale: float
    drop: Dropout = NO_DROPOUT

    def columns(self, begin: int, end: int) -> "LowRank":
        """Columns ``begin`` to ``end`` of a product in which nothing is dropped, or all columns."""
        if (begin, end) == (0, self.b.shape[1]):
            return self
        assert self.drop.seed is None  # the mask is of the whole
        return LowRank(self.s, self.b[:, begin:end], self.scale)

    def add_to(self, out: Tensor) -> None:
        """out += scale drop(S B)."""
        if self.drop.seed is None:
            mm(self.s, self.b, out, scale=self.scale, accumulate=True)
        else:
            out.add_(self.drop(mm(self.s, self.b)), alpha=self.scale)


@dataclass(frozen=True)
class Wide:
    """[x | S]: ``buffer`` [M, K + tail]; this adapter's S begins at column ``slot`` of the tail,
    the rest of which belongs to others.
    """

    buffer: Tensor
    tail: int
    slot: int

    def fill(self, weight: Tensor, low: LowRank) -> None:
        """Write [0 | scale Bᵀ | 0] beside a decoded weight [N, K + tail]."""
        side = weight[:, -self.tail :]
        side.zero_()
        torch.mul(low.b.t(), low.scale, out=side[:, self.slot : self.slot + low.b.shape[0]])


def product(
    x: Tensor,
    w: Tensor,
    low: LowRank | None,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    """out = x W + bias + the low-rank product, or out += it; any strides."""
    if low is not None and not accumulate and prefers_triton("lora_matmul", x, EPILOGUE):
        with device_guard(x):
            kernels = implementation("lora_matmul", "triton")
            kernels.lora_matmul(x, w, low.s, low.b, low.scale, bias, out, *low.drop.as_numbers())
        return
    mm(x, w, out, bias, accumulate=accumulate)
    if low is not None:
        low.add_to(out)
