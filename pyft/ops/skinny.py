"""Products with one thin side, the adapter's: S = scale drop(x) Aᵀ and dA = scale Sᵀ drop(x).

    x [M, K]   A, dA [R, K]   S [M, R]

The vendor's matmul where nothing is dropped; else on a GPU a Triton kernel that reads x once, drops
it in registers and sums in a fixed order, and elsewhere the vendor's matmul of drop(x).
"""

import torch
from torch import Tensor

from pyft.backend import device_guard, implementation, prefers_triton
from pyft.ops.dropout import Dropout
from pyft.ops.shared.matmul import mm

# Where ``auto`` takes the kernel although nothing is dropped: device type -> dtypes. None was
# measured on a GPU yet.
UNDROPPED: dict[str, tuple[torch.dtype, ...]] = {}


def project(x: Tensor, a: Tensor, scale: float, drop: Dropout, out: Tensor | None = None) -> Tensor:
    """S [M, R] of rows x [M, K] and A [R, K] of any strides; ``out`` has any row stride."""
    if out is None:
        out = x.new_empty(x.shape[0], a.shape[0])
    if not _kernel("project", x, a, scale, drop, out):
        mm(drop(x), a.t(), out, scale=scale)
    return out


def reduce(s: Tensor, x: Tensor, scale: float, drop: Dropout, transposed: bool = False) -> Tensor:
    """dA [R, K] of S [M, R] and rows x [M, K]; ``transposed``: its transpose, [K, R]."""
    r, k = s.shape[1], x.shape[1]
    out = x.new_empty((k, r) if transposed else (r, k))
    if not _kernel("reduce", s, x, scale, drop, out.t() if transposed else out):
        left, right = (drop(x).t(), s) if transposed else (s.t(), drop(x))
        mm(left, right, out, scale=scale)
    return out


def _kernel(
    function: str, left: Tensor, right: Tensor, scale: float, drop: Dropout, out: Tensor
) -> bool:
    """Launch the kernel where it is to run; whether it was."""
    x = right if function == "reduce" else left
    dropped = drop.seed is not None
    if not prefers_triton("skinny", x, UNDROPPED, dropped) or not (out.numel() and x.numel()):
        return False
    with device_guard(x):
        getattr(implementation("skinny", "triton"), function)(
            left,
            right,
            scale,
            *drop.as_numbers(),
            out,
        )
    return True
