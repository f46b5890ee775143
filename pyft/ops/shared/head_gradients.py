"""Gradients of a head whose logits are multiplied again: of chunks of rows, and for a 16-bit dW
whose rows the budget does not hold at once, of columns.

    dW of some columns = dzᵀ h of all the rows that count, in one matmul
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.ops import qlinear
from pyft.ops.dropout import NO_DROPOUT
from pyft.ops.logits import Taught, Tile, Weights, gradient_
from pyft.ops.lora_matmul import LowRank, product
from pyft.ops.shared.head import (
    Call,
    Counted,
    Sums,
    Wants,
    chunk_of,
    counted,
    over_rows,
    rows_of,
    tiles_of,
)
from pyft.ops.shared.matmul import mm
from pyft.ops.shared.projection import Projection, inputs_of_adapters, output
from pyft.ops.shared.rows import empty_rows
from pyft.quantized import columns_of


class Known(NamedTuple):
    """What a backward knows of the rows, [N] each; those that do not count hold anything."""

    lse: Tensor
    mean: Tensor | None
    teacher_lse: Tensor | None
    weights: Weights

    def of(self, rows: Counted, begin: int, end: int) -> "Known":
        """Of some of the rows that count."""
        flat = (self.lse, self.mean, self.teacher_lse, *self.weights)
        # contiguous, for a view's gradient may have any strides
        part = [
            None if x is None else rows_of(x, rows.places, begin, end).contiguous() for x in flat
        ]
        lse, mean, teacher_lse, *weights = part
        assert lse is not None
        # nothing but -infinity, as a part of a head may be: exp(-infinity - 0) is its p
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return Known(lse, mean, teacher_lse, Weights(*weights))  # type: ignore[arg-type]


def gradients(call: Call, known: Known, wants: Wants, kept: Tensor) -> list[Tensor]:
    """Of hidden, weight, lora_a, lora_b and bias: what is wanted, the others empty. ``kept`` uint8
    [V]: the columns for which the weight gets a gradient; empty: all.
    """
    rows = counted(call)
    sums = Sums(call, rows, wants, filtered=kept.numel() > 0)
    by_rows = wants.rows or sums.by_rows
    for chunk in over_rows(call, rows, known.teacher_lse) if by_rows else ():
        part = known.of(rows, chunk.begin, chunk.end)
        sums.add(chunk, part.lse, part.mean, part.weights)
    dw = sums.weight
    if wants.weight and not sums.by_rows:
        dw = empty_rows(call.hidden, call.head.out_features, call.hidden.shape[1])
        if kept.numel() or not rows.labels.numel():
            dw.zero_()
        if rows.labels.numel():
            _weight_gradient(call, rows, known.of(rows, 0, len(rows.labels)), kept, dw)
    dtype = call.hidden.dtype
    return [sums.hidden, dw, *(x.to(dtype) for x in sums.of_leaves())]


def _weight_gradient(call: Call, rows: Counted, known: Known, kept: Tensor, dw: Tensor) -> None:
    """dzᵀ h of all the rows that count, some columns of dz at a time."""
    many, v, tiles = len(rows.labels), call.head.out_features, tiles_of(call)
    x = rows_of(call.hidden, rows.places, 0, many)
    s = inputs_of_adapters(x, [call.head], NO_DROPOUT)
    step = max(1, chunk_of(v, many * tiles, call.budget, x))
    memory = [x.new_empty(many * step) for _ in range(tiles)]
    h = x if call.teacher_hidden is None else rows_of(call.teacher_hidden, rows.places, 0, many)
    s_teacher = inputs_of_adapters(h, [call.teacher], NO_DROPOUT)
    pieces: Sequence[Any] = [slice(b, min(b + step, v)) for b in range(0, v, step)]
    if kept.numel():
        pieces = kept.nonzero()[:, 0].split(step)
    for piece in pieces:
        part = _columns(call.head, piece)
        shape = (many, part.out_features)
        z, *z_teacher = (flat[: shape[0] * shape[1]].view(shape) for flat in memory)
        taught = None
        if call.teacher_hidden is not None and known.teacher_lse is not None:
            _teacher_columns(h, s_teacher, call.teacher, piece, z_teacher[0])
            rule = (call.teacher_scale, call.teacher_softcap)
            taught = Taught(z_teacher[0], known.teacher_lse, *rule)
        weights = None if call.class_weights is None else call.class_weights[piece].contiguous()
        labels = _among(rows.labels, piece)
        tile = Tile(
            output(x, s, part, None, z), labels, weights, call.logit_scale, call.softcap, taught
        )
        gradient_(tile, known.lse, known.mean, known.weights, call.name)
        if isinstance(piece, slice):
            mm(z.t(), x, dw[piece])
        else:
            dw[piece] = mm(z.t(), x)


def _among(labels: Tensor, piece: Any) -> Tensor:
    """Labels as positions among some columns; -1 where they are not of them."""
    if isinstance(piece, slice):
        return torch.sub(labels, piece.start)
    place = torch.searchsorted(piece, labels).clamp_(max=len(piece) - 1)
    return torch.where(torch.eq(piece[place], labels), place, -1)


def _columns(p: Projection, piece: Any) -> Projection:
    """A dense head's columns of logits: a slice of them or their indices."""
    assert p.weight is not None
    weight = p.weight[piece]
    beside = (None if x is None else x[piece] for x in (p.lora_b, p.bias))
    lora_b, bias = beside
    return p._replace(weight=weight, lora_b=lora_b, bias=bias, out_features=len(weight))


def _teacher_columns(h: Tensor, s: Tensor, p: Projection, piece: slice, out: Tensor) -> None:
    """A teacher's logits of some columns."""
    if p.weight is not None:
        output(h, s, _columns(p, piece), None, out)
        return
    order = columns_of(p.stored)
    k = h.shape[1]
    stored = qlinear.Stored(p.stored, p.format, p.block_size, (p.out_features, k))
    with stored.slab((piece.start, piece.stop, 0, k), qlinear.decoded_dtype(h)) as decoded:
        low = None if p.lora_b is None else LowRank(s, p.lora_b[piece].t(), p.scale)
        bias = None if p.bias is None else p.bias[piece]
        h = h if order is None else h.index_select(1, order)
        product(h, decoded.to(h.dtype).t(), low, bias, out)


def fake_gradients(call: Call, wants: Wants) -> list[Tensor]:
    """Empty tensors like those of ``gradients``."""
    p, (n, d) = call.head, call.hidden.shape
    shapes = ((n, d), (p.out_features, d), (p.rank, d), (p.out_features, p.rank), (p.out_features,))
    return [
        call.hidden.new_empty(shape if wanted else 0)
        for shape, wanted in zip(shapes, wants, strict=True)
    ]
