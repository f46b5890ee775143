"""Gated activations and plain ones, forward and backward.

    y = act(gate) up        dgate = dy up act'(gate)        dup = dy act(gate)

and without ``up``: y = act(gate), dgate = dy act'(gate). The backward can give y again beside them,
for the caller's weight gradients. Each input is read before an output is written, so that outputs
may be the memory of inputs.

Bytes moved with 2-byte elements: forward 6 M I (4 without up), backward 10 M I (6), 2 more with y.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.tiles import activate, activate_with_slope


@triton.jit
def glu_kernel(
    gate_ptr, up_ptr, out_ptr, N, stride_gm, stride_um, stride_om,
    ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE elements of one row of N."""
    tiles = tl.cdiv(N, TILE)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs_n < N
    gate = tl.load(gate_ptr + m * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION)
    if up_ptr is not None:
        y *= tl.load(up_ptr + m * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * stride_om + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, N, stride_ym, stride_gm, stride_um,
    stride_dgm, stride_dum, stride_om, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE elements of one row of N."""
    tiles = tl.cdiv(N, TILE)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs_n < N
    dy = tl.load(dy_ptr + m * stride_ym + offs_n, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + m * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + m * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    # Threads may hold other elements when they store than when they load, where alignments differ:
    # none writes over an input before all have read theirs.
    tl.debug_barrier()
    y, slope = activate_with_slope(gate, ACTIVATION)
    dgate = dy * slope
    if up_ptr is not None:
        dup = dy * y
        tl.store(dup_ptr + m * stride_dum + offs_n, dup.to(dup_ptr.dtype.element_ty), mask=mask)
        dgate *= up
        y *= up
    tl.store(dgate_ptr + m * stride_dgm + offs_n, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        tl.store(out_ptr + m * stride_om + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


def glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    out: Tensor,
    config: configs.Glu = configs.GLU,
) -> None:
    """gate, up [M, I] -> out [M, I]; adjacent columns, any row stride."""
    tensors = (gate, up, out)
    rows, cols, strides = _flatten(*tensors)
    if rows * cols > 0:
        glu_kernel[(rows * triton.cdiv(cols, config.tile),)](
            *tensors, cols, *strides, ACTIVATION=activation, TILE=config.tile,
            num_warps=config.num_warps,
        )  # fmt: skip


def glu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    dgate: Tensor,
    dup: Tensor | None,
    out: Tensor | None,
    config: configs.Glu = configs.GLU,
) -> None:
    """dy, gate, up [M, I] -> dgate, dup and, where it is given, out = act(gate) up, [M, I].

    Adjacent columns, any row stride; outputs may be the memory of inputs, row for row.
    """
    tensors = (dy, gate, up, dgate, dup, out)
    rows, cols, strides = _flatten(*tensors)
    if rows * cols > 0:
        glu_backward_kernel[(rows * triton.cdiv(cols, config.tile),)](
            *tensors, cols, *strides, ACTIVATION=activation, TILE=config.tile,
            num_warps=config.num_warps,
        )  # fmt: skip


def _flatten(first: Tensor, *others: Tensor | None) -> tuple[int, int, list[int]]:
    """Rows, columns and row strides, as one row where all rows follow one another."""
    rows, cols = first.shape
    strides = [0 if x is None else x.stride(0) for x in (first, *others)]
    if all(x is None or x.is_contiguous() for x in (first, *others)):
        return 1, rows * cols, [0] * len(strides)
    return rows, cols, strides
