"""Attention without the matrix of scores in memory: forward, and what its backward needs of o.

    s = scale q kᵀ      softcap tanh(s / softcap)      + bias - slope |p - j|
    lse = log(sum exp(s) + exp(sink))      o = dropped(exp(s - lse)) v      delta = sum(o do) - dlse

A program has BLOCK_M queries of one head and goes through the blocks of keys that they see, with
the largest score, the sum and o so far in fp32 (Milakov and Gimelshein, 2018; Dao et al., 2022); a
sink is where they start from. Blocks that all queries see whole are a loop of their own, without
masks. Packed sequences have tiles of their own, found by the device from cu_seqlens, so nothing
depends on the longest. With causal attention, the queries that see most go first.

Bytes moved: q and o once, k and v once for each block of queries, mostly from the L2 cache.
Temporary memory: none.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.attention_backward import attention_backward
from pyft.kernels.attention_bias import attention_bias_backward
from pyft.kernels.attention_launch import (
    Rule,
    default_config,
    features_of,
    heads_at_once,
    numbers_of,
    padded,
    strides_of,
    tiles_of,
)
from pyft.kernels.attention_tiles import (
    INFINITY,
    LN2,
    added_to,
    block_at,
    blocks_seen,
    count_of,
    exponential,
    head_at,
    in_units,
    kept_of,
    load_rows,
    program_at,
    scores_of,
    sequence_at,
    store_rows,
    unit_of,
)

__all__ = ["attention", "attention_backward", "attention_bias_backward", "attention_delta"]


@triton.jit
def attend(
    acc, total, top, q, k_ptr, v_ptr, stride_ks, stride_vs, i, row, queries, keys, pitch, blocks,
    rule, added, of_head, FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Take blocks of keys, those seen whole or in part, into acc [BLOCK_M, BLOCK_DV], total and top
    [BLOCK_M]: sum exp2(x - top) v, sum exp2(x - top) and the largest x.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    unit = unit_of(rule, FLAGS)
    for step in range(count_of(blocks, ALL)):
        start = block_at(step, blocks, ALL) * BLOCK_N
        k = load_rows(k_ptr, start, stride_ks, keys, ALL, D, BLOCK_N, BLOCK_D)
        dot = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        j = start + tl.arange(0, BLOCK_N)
        x, _ = scores_of(
            dot, i[:, None], j[None, :], queries, keys, rule, added, of_head, FLAGS, ALL
        )
        new_top = tl.maximum(top, tl.max(x, axis=1) * unit)
        base = tl.where(new_top == -INFINITY, 0.0, new_top)  # nothing seen yet
        p = exponential(x * unit - base[:, None], FLAGS[5])
        shrink = exponential(top - base, FLAGS[5])
        total = total * shrink + tl.sum(p, axis=1)
        if FLAGS[4]:
            p = tl.where(kept_of(row, start, pitch, rule, BLOCK_N), p, 0.0)
        v = load_rows(v_ptr, start, stride_vs, keys, ALL, DV, BLOCK_N, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=[
    "Sq", "Sk", "sequences", "all_heads", "tiles", "span", "left", "right", "shift", "seed",
    "threshold", "stride_bb", "stride_bh", "stride_bq",
])  # fmt: skip
def attention_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, Sq,
    Sk, sequences, heads, group, all_heads, tiles, span, scale, cap, left, right, shift,
    seed: tl.int64, threshold: tl.int64, keep, stride_qb, stride_qh, stride_qs, stride_kb,
    stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_bb, stride_bh, stride_bq,
    stride_bk, stride_ob, stride_oh, stride_os, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one of ``all_heads``, those of all the batch."""
    ascending, head = program_at(tl.program_id(0), tiles, all_heads, span)
    place, q_begin, queries, k_begin, keys = sequence_at(
        tiles - 1 - ascending, cu_q_ptr, cu_k_ptr, Sq, Sk, sequences, BLOCK_M
    )
    if place >= queries:
        return
    batch, head = head // heads, head % heads
    rule = (scale, cap, left, right, shift, seed, threshold, keep)
    FLAGS: tl.constexpr = (LEFT, RIGHT, SOFTCAP, SCALED, DROPOUT, PRECISE)
    added = (bias_ptr, slopes_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
    q_ptr = head_at((q_ptr, stride_qb, stride_qh, stride_qs), batch, head, q_begin)
    k_ptr = head_at((k_ptr, stride_kb, stride_kh, stride_ks), batch, head // group, k_begin)
    v_ptr = head_at((v_ptr, stride_vb, stride_vh, stride_vs), batch, head // group, k_begin)
    o_ptr = head_at((o_ptr, stride_ob, stride_oh, stride_os), batch, head, q_begin)

    i = place + tl.arange(0, BLOCK_M)
    row = (batch * heads + head).to(tl.int64) * Sq + q_begin + i
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    if sinks_ptr is not None:
        top = tl.zeros((BLOCK_M,), tl.float32) + in_units(tl.load(sinks_ptr + head), PRECISE)
        total = tl.where(top == -INFINITY, 0.0, 1.0)
    blocks = blocks_seen(
        place, queries, keys, keys - queries + shift, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    q = load_rows(q_ptr, place, stride_qs, queries, False, D, BLOCK_M, BLOCK_D)
    for ALL in tl.static_range(1, -1, -1):
        acc, total, top = attend(
            acc, total, top, q, k_ptr, v_ptr, stride_ks, stride_vs, i, row, queries, keys,
            (Sk + 3) // 4 * 4, blocks, rule, added, added_to(added, batch, head, heads, PRECISE),
            FLAGS, D, DV, BLOCK_N, ALL,
        )  # fmt: skip
    some = tl.where(total == 0, 1.0, total)
    o = acc * ((keep if DROPOUT else 1.0) / some)[:, None]
    store_rows(o_ptr, o, place, stride_os, queries, DV)
    lse = top + tl.log(some) if PRECISE else (top + tl.log2(some)) * LN2
    lse = tl.where(total == 0, -INFINITY, lse)
    tl.store(lse_ptr + row, lse, mask=i < queries)


@triton.jit(do_not_specialize=["S", "stride_lb", "stride_lh"])
def delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, S, heads, stride_ob, stride_oh, stride_os, stride_gb,
    stride_gh, stride_gs, stride_lb, stride_lh, stride_ls, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head."""
    blocks = tl.cdiv(S, BLOCK_M)
    head, place = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    batch, head = head // heads, head % heads
    o_ptr = head_at((o_ptr, stride_ob, stride_oh, stride_os), batch, head, 0)
    do_ptr = head_at((do_ptr, stride_gb, stride_gh, stride_gs), batch, head, 0)
    o = load_rows(o_ptr, place, stride_os, S, False, DV, BLOCK_M, BLOCK_DV).to(tl.float32)
    do = load_rows(do_ptr, place, stride_gs, S, False, DV, BLOCK_M, BLOCK_DV).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    i = place.to(tl.int64) + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        dlse_ptr = head_at((dlse_ptr, stride_lb, stride_lh, stride_ls), batch, head, 0)
        delta -= tl.load(dlse_ptr + i * stride_ls, mask=i < S, other=0.0)
    row = (batch * heads + head).to(tl.int64) * S + i
    tl.store(delta_ptr + row, delta, mask=i < S)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: Rule,
    o: Tensor,
    lse: Tensor,
    config: configs.Attention | None = None,
) -> None:
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] -> o [B, Hq, Sq, Dv], all of one
    dtype, with adjacent last dimensions; lse fp32 [B, Hq, Sq], contiguous.

    sinks fp32 [Hq]; bias [B, Hq, Sq, Sk], any dtype and strides; slopes fp32 [B, Hq]; cu_q, cu_k
    int32 [sequences + 1], with B = 1 and no bias.
    """
    (batch, heads, sq, d), (kv_heads, sk, dv) = q.shape, v.shape[1:]
    if batch * heads * sq == 0:
        return
    config = config or default_config(q, max(d, dv), rule, bias, slopes)
    tile = config.forward
    tiles = tiles_of(sq, cu_q, tile.block_m)
    group = heads // kv_heads
    span = heads_at_once(k, v, group)
    attention_kernel[(tiles * batch * heads,)](
        q, k, v, sinks, bias, slopes, cu_q, cu_k, o, lse, sq, sk,
        0 if cu_q is None else len(cu_q) - 1, heads, group, batch * heads, tiles, span,
        *numbers_of(rule, q.dtype), *strides_of(q, k, v),
        *((0, 0, 0, 0) if bias is None else bias.stride()), *strides_of(o), D=d, DV=dv,
        BLOCK_D=padded(d), BLOCK_DV=padded(dv),
        **features_of(rule, q.dtype, bias, slopes), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def attention_delta(
    o: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    delta: Tensor,
    config: configs.AttentionDelta = configs.ATTENTION_DELTA,
) -> None:
    """o, do [B, H, S, Dv], adjacent last dimensions; dlse fp32 [B, H, S], any strides -> delta fp32
    [B, H, S], contiguous.
    """
    batch, heads, seq, dv = o.shape
    if batch * heads * seq == 0:
        return
    block_m = max(1, config.tile // padded(dv))
    delta_kernel[(batch * heads * triton.cdiv(seq, block_m),)](
        o, do, dlse, delta, seq, heads, *strides_of(o, do),
        *((0, 0, 0) if dlse is None else dlse.stride()), DV=dv, BLOCK_DV=padded(dv),
        BLOCK_M=block_m, num_warps=config.num_warps,
    )  # fmt: skip
