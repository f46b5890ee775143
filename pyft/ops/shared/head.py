"""A head's logits tile by tile: what the losses over them share.

    z = h Wᵀ + bias + scale (h Aᵀ) Bᵀ        h [N, D]   W [V, D]   z [M, V] of the M rows that count

Rows whose label is ``ignore_index`` are dropped first. The others are taken in chunks of as many as
the budget holds logits of; a chunk's logits become their own gradient where they lie, and dh of the
chunk is one matmul of all V columns, so that no sum is split. What the head may learn (bias,
adapter, an fp32 weight) is summed over chunks in fp32. A 16-bit dW needs all rows at once: where
the budget holds them it is one matmul more; where not the chunks are of columns, and the logits are
multiplied once more.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.ops.dropout import NO_DROPOUT
from pyft.ops.logits import (
    Filter,
    Taught,
    Tile,
    Wanted,
    Weights,
    gradient_,
    statistics,
    wide,
)
from pyft.ops.lora_matmul import LowRank
from pyft.ops.shared.matmul import mm
from pyft.ops.shared.projection import (
    FIELDS,
    Projection,
    adapter_gradients,
    input_gradient,
    inputs_of_adapters,
    output,
    schema,
)
from pyft.ops.shared.rows import empty_rows

NO_HEAD = Projection(None, [], None, None, None, "", 0, 0, 0.0)
_PIECE = 8192  # columns of a tile that are in fp32 at once, or a quarter of the budget


class LabelError(UsageError):
    """A label that names no column: where it is among the rows, and what it is."""

    def __init__(self, row: int, label: int, columns: int, ignore_index: int) -> None:
        super().__init__(
            f"labels: row {row} is {label}; need 0 to {columns - 1}, or ignore_index {ignore_index}"
        )
        self.row, self.label = row, label


class Call(NamedTuple):
    """What a loss over logits is given, in the order of the schema once ``flat``."""

    hidden: Tensor  # [N, D], adjacent columns
    labels: Tensor  # int64 [N]
    class_weights: Tensor | None  # fp32 or float64 [V]
    teacher_hidden: Tensor | None  # [N, D']
    head: Projection
    teacher: Projection
    logit_scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    ignore_index: int
    first: int  # the label of the head's first row, and how many labels there are:
    total: int  # more than the head has rows where it is a shard
    budget: int  # bytes of logits
    name: str

    def flat(self) -> tuple[Any, ...]:
        """With the fields of both heads among its own."""
        return (*self[:4], *self.head, *self.teacher, *self[6:])

    @staticmethod
    def of(arguments: Sequence[Any]) -> "Call":
        """Of its ``flat`` form."""
        heads = Projection(*arguments[4 : 4 + FIELDS]), Projection(*arguments[4 + FIELDS : _LAST])
        return Call(*(*arguments[:4], *heads, *arguments[_LAST:]))


_LAST = 4 + 2 * FIELDS
FLAT = len(Call._fields) - 2 + 2 * FIELDS
SCHEMA = (
    f"Tensor hidden, Tensor labels, Tensor? class_weights, Tensor? teacher_hidden, "
    f"{schema('')}, {schema('_teacher')}, float logit_scale, float? softcap, float teacher_scale, "
    "float? teacher_softcap, int ignore_index, int first, int total, int budget, str name"
)


class Counted(NamedTuple):
    """The rows that count."""

    places: Tensor | None  # int64 [M] among all rows; None: all
    labels: Tensor  # int64 [M], of the head's rows; outside them where another shard has it


def counted(call: Call) -> Counted:
    """Raises LabelError where a label is none. A GPU is waited for: how many rows count decides
    what is launched.
    """
    labels = call.labels
    counts = labels != call.ignore_index
    wrong = counts & ((labels < 0) | (labels >= call.total))
    many, bad = torch.stack((counts.sum(), wrong.sum())).tolist()
    if bad:
        row = int(wrong.nonzero()[0])
        raise LabelError(row, int(labels[row]), call.total, call.ignore_index)
    places = None if many == len(labels) else counts.nonzero()[:, 0]
    kept = labels if places is None else labels.index_select(0, places)
    return Counted(places, (kept - call.first).contiguous())


def rows_of(x: Tensor, places: Tensor | None, begin: int, end: int) -> Tensor:
    """Some of the rows that count: a view where all do."""
    return x[begin:end] if places is None else x.index_select(0, places[begin:end])


def write_rows(into: Tensor, part: Tensor, places: Tensor | None, begin: int, end: int) -> None:
    """Where ``rows_of`` takes them from."""
    if places is None:
        into[begin:end] = part
    else:
        into.index_copy_(0, places[begin:end], part)


def chunk_of(total: int, length: int, budget: int, like: Tensor) -> int:
    """In how large steps to go over ``total`` so that each has at most ``budget`` bytes, ``length``
    elements of like's dtype for each; 0 where not one has room.
    """
    fitting = budget // max(1, length * like.element_size())
    if fitting >= total or fitting == 0:
        return min(total, fitting)
    multiple = next(size for size in (64, 16, 4, 1) if fitting >= size)
    step = -(-total // -(-total // (fitting // multiple * multiple)))  # about equal ones
    return min(-(-step // multiple) * multiple, fitting // multiple * multiple)


def tiles_of(call: Call) -> int:
    """How many tiles the budget has to hold at once."""
    return 1 if call.teacher_hidden is None else 2


def row_chunk(call: Call, rows: int) -> int:
    """Rows of logits at once."""
    return max(1, chunk_of(rows, call.head.out_features * tiles_of(call), call.budget, call.hidden))


class Chunk(NamedTuple):
    """Some of the rows that count, and their logits."""

    begin: int
    end: int
    x: Tensor  # [m, D]
    s: Tensor  # [m, R], the adapter's input
    tile: Tile


def over_rows(call: Call, rows: Counted, teacher_lse: Tensor | None = None) -> Iterator[Chunk]:
    """Chunks of the rows that count; the logits lie in memory that the next chunk writes over.
    ``teacher_lse`` [N] where it is known.
    """
    many, v = rows.labels.shape[0], call.head.out_features
    step = row_chunk(call, many)
    tiles = tiles_of(call) if many else 0
    width = -(-v // 16) * 16  # kernels load so many elements at once
    buffers = [empty_rows(call.hidden, step, width)[:, :v] for _ in range(tiles)]
    rule = (call.teacher_scale, call.teacher_softcap)
    for begin in range(0, many, step):
        end = min(begin + step, many)
        x, labels = rows_of(call.hidden, rows.places, begin, end), rows.labels[begin:end]
        s = inputs_of_adapters(x, [call.head], NO_DROPOUT)
        z = output(x, s, call.head, None, buffers[0][: end - begin])
        taught = None
        if call.teacher_hidden is not None:
            h = rows_of(call.teacher_hidden, rows.places, begin, end)
            s_teacher = inputs_of_adapters(h, [call.teacher], NO_DROPOUT)
            z_teacher = output(h, s_teacher, call.teacher, None, buffers[1][: end - begin])
            if teacher_lse is None:
                lse = statistics(Tile(z_teacher, labels, None, *rule), Wanted(), call.name).lse
            else:
                lse = rows_of(teacher_lse, rows.places, begin, end)
            taught = Taught(z_teacher, lse, *rule)
        tile = Tile(z, labels, call.class_weights, call.logit_scale, call.softcap, taught)
        yield Chunk(begin, end, x, s, tile)


class Wants(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool

    @property
    def rows(self) -> bool:
        """Whether any is made from chunks of rows."""
        return self.hidden or self.lora_a or self.lora_b or self.bias


def dw_by_rows(call: Call, wants: Wants, filtered: bool) -> bool:
    """Whether dW is made from chunks of rows: in fp32 (float64) it is their sum itself, and of bf16
    there is no sum where one chunk has them all. fp16 has not the range for what rows weigh.
    """
    if filtered or not wants.weight:
        return False
    hidden, v = call.hidden, call.head.out_features
    if hidden.dtype == torch.bfloat16:
        return hidden.shape[0] * v * tiles_of(call) * hidden.element_size() <= call.budget
    return hidden.dtype == wide(hidden.dtype)


class Sums:
    """Gradients made from chunks of rows: dh, in fp32 those of the adapter and the bias, and dW
    where ``dw_by_rows``.

    With ``threshold`` columns of which no row of a chunk has that probability are left out of dh;
    ``kept`` uint8 [V] notes the others.
    """

    def __init__(
        self,
        call: Call,
        rows: Counted,
        wants: Wants,
        threshold: float = 0.0,
        filtered: bool = False,
    ) -> None:
        self.call, self.places, self.wants, self.threshold = call, rows.places, wants, threshold
        hidden, p, (n, d) = call.hidden, call.head, call.hidden.shape
        dtype = wide(hidden.dtype)
        self.hidden = empty_rows(hidden, n, d) if wants.hidden else hidden.new_empty(0)
        if rows.places is not None:
            self.hidden.zero_()
        a_shape = (p.rank, d) if wants.lora_a else (0,)
        self.lora_a = hidden.new_zeros(a_shape, dtype=dtype)
        # one beside the other: a tile is read once for both
        cols = wants.lora_b * p.rank + wants.bias
        self._beside = hidden.new_zeros(p.out_features if cols else 0, cols, dtype=dtype)
        self.by_rows = dw_by_rows(call, wants, filtered or threshold > 0)
        self.weight = hidden.new_zeros((p.out_features, d) if self.by_rows else 0)
        self.kept = hidden.new_zeros(p.out_features if threshold else 0, dtype=torch.uint8)

    def of_leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 sums for lora_a [R, D], lora_b [V, R] and bias [V], or empty."""
        empty, rank = self._beside.new_empty, self.call.head.rank
        bias = self._beside[:, -1].contiguous() if self.wants.bias else empty(0)
        lora_b = self._beside[:, :rank].contiguous() if self.wants.lora_b else empty(0)
        return self.lora_a, lora_b, bias

    def add(
        self,
        chunk: Chunk,
        lse: Tensor,
        mean: Tensor | None,
        weights: Weights,
        share: Tensor | None = None,
    ) -> None:
        """Turn a chunk's logits into their gradient and take what is wanted of it; ``share`` [m]
        multiplies each row in the sums, not in dh.
        """
        dz, p = chunk.tile.z, self.call.head
        filtered = Filter(self.threshold, torch.zeros_like(self.kept)) if self.threshold else None
        gradient_(chunk.tile, lse, mean, weights, self.call.name, filtered)
        ds = adapter_gradients([dz], [p], self.wants.lora_a or (self.wants.hidden and p.rank > 0))
        if self.wants.hidden:
            self._add_hidden(chunk, ds, filtered)
        dtype = self._beside.dtype
        if self.by_rows:
            x = chunk.x if share is None else (chunk.x * share[:, None]).to(dz.dtype)
            mm(dz.t(), x, self.weight, accumulate=True)
        if share is None:
            share = dz.new_ones(dz.shape[0], dtype=dtype)
        if self.wants.lora_a and ds is not None:
            self.lora_a.addmm_((ds.to(dtype) * share[:, None]).t(), chunk.x.to(dtype))
        right = [chunk.s.to(dtype) * (share * p.scale)[:, None]] if self.wants.lora_b else []
        right += [share[:, None]] if self.wants.bias else []
        step = max(64, min(_PIECE, self.call.budget // (16 * len(dz))))
        for begin in range(0, p.out_features if right else 0, step):
            piece = dz[:, begin : begin + step].to(dtype)
            self._beside[begin : begin + step].addmm_(piece.t(), torch.cat(right, 1))

    def _add_hidden(self, chunk: Chunk, ds: Tensor | None, filtered: Filter | None) -> None:
        dz, p, d = chunk.tile.z, self.call.head, self.call.hidden.shape[1]
        columns = None
        if filtered is not None:
            self.kept |= filtered.kept
            columns = filtered.kept.nonzero()[:, 0]
        if columns is not None and 2 * len(columns) < p.out_features and p.weight is not None:
            part = _of_columns(dz, p.weight, columns, self.call.budget // 2)
            if ds is not None and p.lora_a is not None:
                LowRank(ds, p.lora_a, 1.0).add_to(part)
        else:
            part = input_gradient([dz], ds, [p], NO_DROPOUT, d)
        write_rows(self.hidden, part, self.places, chunk.begin, chunk.end)


def _of_columns(dz: Tensor, weight: Tensor, columns: Tensor, budget: int) -> Tensor:
    """dz W of some columns [C] of dz, with ``budget`` bytes for copies of them."""
    total = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide(dz.dtype))
    step = max(1, chunk_of(len(columns), sum(total.shape), budget, dz))
    for piece in columns.split(step):
        total += mm(dz.index_select(1, piece), weight.index_select(0, piece))
    return total.to(dz.dtype)
