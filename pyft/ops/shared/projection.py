"""Linears with adapters over one input, as the fused ops share them.

    y_i = x W_iᵀ + bias_i + scale_i S_i B_iᵀ        S = [S_0 | S_1 ..] = drop(x) [A_0 ; A_1 ..]ᵀ

    x [M, K]   W_i [N_i, K]   A_i [R_i, K]   B_i [N_i, R_i]   S [M, ΣR]   y_i, dY_i [M, N_i]

    dS_i = scale_i dY_i B_i                       computed once, used by dX and dA
    dX = Σ dY_i W_i + drop(dS A)                  the same mask as the forward's
    dA = dSᵀ drop(x)    dB_i = scale_i dY_iᵀ S_i
    dW_i = dY_iᵀ x      dbias_i = sum of dY_i over rows

The A are stacked, so that x is read once for S and once for dA, and dX takes one low-rank product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyft.backend import chosen
from pyft.ops import qlinear, skinny
from pyft.ops.dropout import NO_DROPOUT, Dropout
from pyft.ops.lora_matmul import LowRank, Wide, product
from pyft.ops.shared.matmul import mm
from pyft.ops.shared.rows import empty_rows


class Projection(NamedTuple):
    """One linear and its adapter as they travel through an op's schema. The weight is dense, or
    None with the stored tensors of a quantized one, their format and block size.
    """

    weight: Tensor | None
    stored: list[Tensor]
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    format: str
    block_size: int
    out_features: int
    scale: float

    @property
    def rank(self) -> int:
        """0 without an adapter."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]


FIELDS = len(Projection._fields)
LEAVES = (0, 2, 3, 4)  # the fields that may get a gradient: weight, lora_a, lora_b, bias


def schema(suffix: str) -> str:
    """The arguments of one projection in the language of torch.library."""
    return (
        f"Tensor? weight{suffix}, Tensor[] stored{suffix}, Tensor? lora_a{suffix}, "
        f"Tensor? lora_b{suffix}, Tensor? bias{suffix}, str format{suffix}, "
        f"int block_size{suffix}, int out_features{suffix}, float scale{suffix}"
    )


def unflatten(arguments: Sequence[object]) -> list[Projection]:
    """Projections of their fields one after another."""
    return [
        Projection(*arguments[i : i + FIELDS])  # type: ignore[arg-type]
        for i in range(0, len(arguments), FIELDS)
    ]


def stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after another; the only one itself."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def inputs_of_adapters(x: Tensor, projections: Sequence[Projection], drop: Dropout) -> Tensor:
    """S [M, ΣR]; [M, 0] without adapters."""
    adapters = [p.lora_a for p in projections if p.lora_a is not None]
    if not adapters:
        return x.new_empty(x.shape[0], 0)
    return skinny.project(x, stacked(adapters), 1.0, drop)


def outputs(
    x: Tensor, s: Tensor, projections: Sequence[Projection], buffer: Tensor | None = None
) -> list[Tensor]:
    """y_i of each projection. ``buffer`` [M, K + ΣR or more]: x is its left part, and what lies
    right of it may be written to.
    """
    tail = s.shape[1]
    if buffer is not None and tail and any(p.weight is None for p in projections):
        buffer = buffer[:, : x.shape[1] + tail]
        buffer[:, x.shape[1] :].copy_(s)
    else:
        buffer = None
    found, slot = [], 0
    for p in projections:
        wide = None if buffer is None or p.lora_b is None else Wide(buffer, tail, slot)
        found.append(output(x, s[:, slot : slot + p.rank], p, wide))
        slot += p.rank
    return found


def output(
    x: Tensor, s: Tensor, p: Projection, wide: Wide | None = None, out: Tensor | None = None
) -> Tensor:
    """y of one projection, S [M, R] its own; written to ``out`` where that is given."""
    low = None if p.lora_b is None else LowRank(s, p.lora_b.t(), p.scale)
    if p.weight is None:
        shape = (p.out_features, x.shape[1])
        stored = qlinear.Stored(p.stored, p.format, p.block_size, shape)
        return qlinear.forward(x, stored, p.bias, chosen(), low, wide, out)
    y = empty_rows(x, x.shape[0], p.out_features) if out is None else out
    product(x, p.weight.t(), low, p.bias, y)
    return y


class Needs(NamedTuple):
    """Which gradients of a projection are wanted."""

    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool


def adapter_gradients(
    dys: Sequence[Tensor], projections: Sequence[Projection], wanted: bool
) -> Tensor | None:
    """dS [M, ΣR]; None where it is not ``wanted`` or there is no adapter."""
    total = sum(p.rank for p in projections)
    if not wanted or total == 0:
        return None
    ds, slot = dys[0].new_empty(dys[0].shape[0], total), 0
    for dy, p in zip(dys, projections, strict=True):
        if p.lora_b is not None:
            part = ds[:, slot : slot + p.rank]
            skinny.project(dy, p.lora_b.t(), p.scale, NO_DROPOUT, part)
            slot += p.rank
    return ds


def input_gradient(
    dys: Sequence[Tensor],
    ds: Tensor | None,
    projections: Sequence[Projection],
    drop: Dropout,
    in_features: int,
) -> Tensor:
    """dX [M, K]."""
    low = None
    if ds is not None:
        a = stacked([p.lora_a for p in projections if p.lora_a is not None])
        low = LowRank(ds, a, 1.0, drop)
    dx: Tensor | None = None
    for dy, p in zip(dys, projections, strict=True):
        if p.weight is None:
            shape = (p.out_features, in_features)
            stored = qlinear.Stored(p.stored, p.format, p.block_size, shape)
            dx = qlinear.input_gradient(dy, stored, chosen(), low, dx)
        else:
            out = empty_rows(dy, dy.shape[0], in_features) if dx is None else dx
            product(dy, p.weight, low, None, out, accumulate=dx is not None)
            dx = out
        low = None  # the first matmul has added it
    assert dx is not None
    return dx


def leaf_gradients(
    dys: Sequence[Tensor],
    ds: Tensor | None,
    x: Tensor | None,
    s: Tensor,
    projections: Sequence[Projection],
    needs: Sequence[Needs],
    drop: Dropout,
) -> list[Tensor]:
    """dW, dA, dB and dbias of each projection, one after another: those that are needed."""
    da_all: Sequence[Tensor] = ()
    if x is not None and ds is not None and any(need.lora_a for need in needs):
        da_all = skinny.reduce(ds, x, 1.0, drop).split([p.rank for p in projections])
    found, slot = [], 0
    for i, (dy, p, need) in enumerate(zip(dys, projections, needs, strict=True)):
        if need.weight and x is not None:
            found.append(mm(dy.t(), x))
        if need.lora_a:
            found.append(da_all[i] if len(projections) == 1 else da_all[i].clone())
        if need.lora_b:
            part = s[:, slot : slot + p.rank]
            found.append(skinny.reduce(part, dy, p.scale, NO_DROPOUT, transposed=True))
        if need.bias:
            found.append(dy.sum(0))
        slot += p.rank
    return found


def fake_leaf_gradients(
    x: Tensor, projections: Sequence[Projection], needs: Sequence[Needs], in_features: int
) -> list[Tensor]:
    """Empty tensors like those of ``leaf_gradients``."""
    found = []
    for p, need in zip(projections, needs, strict=True):
        n, r = p.out_features, p.rank
        shapes = ((n, in_features), (r, in_features), (n, r), (n,))
        found += [x.new_empty(shape) for shape, wanted in zip(shapes, need, strict=True) if wanted]
    return found


def fake_scratch(x: Tensor, projections: Sequence[Projection], in_features: int) -> None:
    """What is decoded at once, the largest: a traced peak must see it."""
    for p in projections:
        if p.weight is None:
            x.new_empty(qlinear.scratch_shape(p.out_features, in_features, x.dtype))
