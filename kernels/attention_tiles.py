"""Jit helpers that attention kernels share: which blocks of keys a block of queries sees; scores
as ``pyft.reference.attention`` has them, and their gradient.

Scores and what they are compared with are in units of log2 e, whose exponential is one instruction;
PRECISE, for fp32 inputs, leaves them as they are, so that a difference is taken before anything is
rounded.

Scores are tiles [BLOCK_M, BLOCK_N] of queries i and keys j, or their transposes: i and j are shaped
to match. What belongs together goes together:

    view    (ptr, stride_b, stride_h, stride_s) of a tensor [B, H, S, D]
    rule    (scale, cap, left, right, shift, seed, threshold, keep) of ``attention_launch``
    FLAGS   (LEFT, RIGHT, SOFTCAP, SCALED, DROPOUT, PRECISE), which of that there is
    added   (bias_ptr, slopes_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
    of_head (where a head's bias begins, its slope)
    blocks  (first, whole, end, last): from first to last some is seen, from whole to end all
"""

import triton
import triton.language as tl

from pyft.kernels.tiles import LOG2E, keep_tile, tanh

LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
SEQUENCES = tl.constexpr(1024)  # looked at together where a block looks for its own


@triton.jit
def program_at(program, tiles, heads, span):
    """(tile, head) of a program: tile by tile of ``span`` heads, whose keys and values the L2 cache
    holds, before the next ``span``.
    """
    section = program // (tiles * span)
    inside = program % (tiles * span)
    width = tl.minimum(span, heads - section * span)
    return inside // width, section * span + inside % width


@triton.jit
def sequence_at(tile, cu_ptr, other_cu_ptr, length, other_length, sequences, BLOCK: tl.constexpr):
    """(place, begin, length) of a tile of queries or keys, and (begin, length) of its other side.

    Sequence s has the tiles from cu[s] // BLOCK + s to before cu[s + 1] // BLOCK + s + 1: as many
    as its length needs or one more, whose place is past its end.
    """
    begin = tl.cast(0, tl.int32)
    place, other_begin = tile * BLOCK, begin
    if cu_ptr is not None:
        begun = begin
        for start in range(0, sequences, SEQUENCES):
            offs = start + tl.arange(0, SEQUENCES)
            before = tl.load(cu_ptr + offs, mask=offs < sequences, other=0) // BLOCK + offs
            begun += tl.sum(((before <= tile) & (offs < sequences)).to(tl.int32))
        begin, other_begin = tl.load(cu_ptr + begun - 1), tl.load(other_cu_ptr + begun - 1)
        length = tl.load(cu_ptr + begun) - begin
        other_length = tl.load(other_cu_ptr + begun) - other_begin
        place = (tile - begin // BLOCK - begun + 1) * BLOCK
    return place, begin, length, other_begin, other_length


@triton.jit
def blocks_seen(
    place, length, other_length, offset, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr,
):  # fmt: skip
    """``blocks`` of the other side for the rows of a block: row i sees i + offset - before to i +
    offset + after, where there are such bounds.
    """
    top = place + offset
    bottom = tl.minimum(place + BLOCK, length) - 1 + offset
    begin = tl.cast(0, tl.int32)
    end = begin + other_length
    whole_begin, whole_end = begin, end
    if BEFORE:
        begin = tl.minimum(tl.maximum(top - before, 0), end)
        whole_begin = tl.minimum(tl.maximum(bottom - before, 0), end)
    if AFTER:
        whole_end = tl.maximum(tl.minimum(top + after + 1, end), 0)
        end = tl.maximum(tl.minimum(bottom + after + 1, end), 0)
    first = begin // OTHER_BLOCK
    last = tl.where(begin < end, tl.cdiv(end, OTHER_BLOCK), first)
    whole = tl.minimum(tl.maximum(tl.cdiv(whole_begin, OTHER_BLOCK), first), last)
    end = tl.maximum(tl.minimum(whole_end // OTHER_BLOCK, last), whole)
    return first, whole, end, last


@triton.jit
def count_of(blocks, ALL: tl.constexpr):
    """How many blocks are seen whole, or in part."""
    first, whole, end, last = blocks
    return end - whole if ALL else last - end + whole - first


@triton.jit
def block_at(step, blocks, ALL: tl.constexpr):
    """The one that is number ``step`` of those."""
    first, whole, end, _ = blocks
    return whole + step if ALL else first + step + tl.where(first + step < whole, 0, end - whole)


@triton.jit
def load_rows(
    ptr, start, stride, length, ALL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] from row ``start``, with 0 beyond D and, unless ALL are there, length."""
    offs_s, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride
    ptrs += offs_s.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if ALL and BLOCK_D == D:
        x = tl.load(ptrs)
    elif ALL:
        x = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        x = tl.load(ptrs, mask=(offs_s < length - start)[:, None], other=0.0)
    else:
        mask = (offs_s < length - start)[:, None] & (offs_d < D)[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0)
    return x


@triton.jit
def store_rows(ptr, x, start, stride, length, D: tl.constexpr):
    """x [BLOCK, BLOCK_D] from row ``start``, but for what is beyond length and D."""
    offs_s, offs_d = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    ptrs = ptr + tl.cast(start, tl.int64) * stride
    ptrs += offs_s.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = (offs_s < length - start)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def in_units(x, PRECISE: tl.constexpr):
    """x in units of log2 e, or as it is."""
    return x if PRECISE else x * LOG2E


@triton.jit
def exponential(x, PRECISE: tl.constexpr):
    """Of x in those units."""
    return tl.exp(x) if PRECISE else tl.exp2(x)


@triton.jit
def scores_of(
    dot, i, j, queries, keys, rule, added, of_head, FLAGS: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """(scores, the tanh in them): of the products q·k of queries i and keys j, -infinity where not
    seen, unless ALL are.

    Those not SCALED are yet to be multiplied by the scale.
    """
    scale, cap, left, right, shift, _, _, _ = rule
    LEFT: tl.constexpr = FLAGS[0]
    RIGHT: tl.constexpr = FLAGS[1]
    SOFTCAP: tl.constexpr = FLAGS[2]
    SCALED: tl.constexpr = FLAGS[3]
    PRECISE: tl.constexpr = FLAGS[5]
    bias_ptr, slopes_ptr, _, _, stride_bq, stride_bk = added
    bias_at, slope = of_head
    x, bent = dot, dot
    if SCALED:
        x = dot * scale
    if SOFTCAP:
        bent = tanh(x, PRECISE)
        x = bent * cap
    position = i + (keys - queries + shift)
    if bias_ptr is not None:
        ptrs = bias_ptr + (bias_at + i.to(tl.int64) * stride_bq + j.to(tl.int64) * stride_bk)
        bias = tl.load(ptrs, mask=(i < queries) & (j < keys), other=0.0).to(tl.float32)
        x += in_units(bias, PRECISE)
    if slopes_ptr is not None:
        x -= slope * tl.abs(position - j).to(tl.float32)
    if not ALL:
        seen = j < keys
        if RIGHT:
            seen = j <= tl.minimum(position + right, keys - 1)
        if LEFT:
            seen = seen & (j >= position - left)
        x = tl.where(seen, x, -INFINITY)
    return x, bent


@triton.jit
def unit_of(rule, FLAGS: tl.constexpr):
    """What scores of ``scores_of`` are yet to be multiplied by."""
    return 1.0 if FLAGS[3] else rule[0]


@triton.jit
def kept_of(row, place, pitch, rule, COLS: tl.constexpr):
    """Which keys from ``place``, a multiple of 4, dropout keeps for rows [ROWS] of the scores."""
    return keep_tile(row, tl.cast(place, tl.int64), pitch, rule[5], rule[6], COLS, True)


@triton.jit
def head_at(view, batch, head, row):
    """Where a head's rows begin, from ``row``."""
    ptr, stride_b, stride_h, stride_s = view
    place = tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    return ptr + (place + tl.cast(row, tl.int64) * stride_s)


@triton.jit
def added_to(added, batch, head, heads, PRECISE: tl.constexpr):
    """``of_head``."""
    bias_ptr, slopes_ptr, stride_bb, stride_bh, _, _ = added
    place, slope = tl.cast(0, tl.int64), tl.cast(0.0, tl.float32)
    if bias_ptr is not None:
        place += tl.cast(batch, tl.int64) * stride_bb + tl.cast(head, tl.int64) * stride_bh
    if slopes_ptr is not None:
        slope += tl.load(slopes_ptr + tl.cast(batch, tl.int64) * heads + head)
        slope = in_units(slope, PRECISE)
    return place, slope


@triton.jit
def lse_of(lse_ptr, i, queries, PRECISE: tl.constexpr):
    """lse of queries in the scores' units, and infinity, so that P is 0, for those that see nothing
    or are not there.
    """
    lse = tl.load(lse_ptr + i, mask=i < queries, other=INFINITY)
    return tl.where(lse == -INFINITY, INFINITY, in_units(lse, PRECISE))


@triton.jit
def gradient_of(p, dp, delta, kept, rule, FLAGS: tl.constexpr):
    """The gradient P (dP - delta) of scores, before the softcap."""
    if FLAGS[4]:
        dp = tl.where(kept, dp * rule[7], 0.0)
    return p * (dp - delta)
