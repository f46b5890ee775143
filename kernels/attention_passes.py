"""The two passes of attention's backward: blocks of keys, which take in the queries that see them,
and blocks of queries, which take in the keys they see. ``attention_backward`` has the equations.

    lengths (Sq, Sk, sequences, cu_q_ptr, cu_k_ptr)
    shares  (heads, kv_heads, group, parts): query heads, key heads, query heads of a key head, into
            how many parts they are split
    order   (tiles, heads, span) of ``program_at``
"""

import triton
import triton.language as tl

from pyft.kernels.attention_tiles import (
    added_to,
    block_at,
    blocks_seen,
    count_of,
    exponential,
    gradient_of,
    head_at,
    kept_of,
    load_rows,
    lse_of,
    program_at,
    scores_of,
    sequence_at,
    store_rows,
    unit_of,
)


@triton.jit
def take_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qs, stride_gs, place, j, row, queries,
    keys, pitch, blocks, rule, added, of_head, FLAGS: tl.constexpr, DK_WANTED: tl.constexpr,
    DV_WANTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Add what blocks of queries, those that see all of the keys or some, give to dk / scale
    [BLOCK_N, BLOCK_D] and dv / keep [BLOCK_N, BLOCK_DV]. Tiles of scores are transposed.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    for step in range(count_of(blocks, ALL)):
        start = block_at(step, blocks, ALL) * BLOCK_M
        i = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, start, stride_qs, queries, ALL, D, BLOCK_M, k.shape[1])
        dot = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        x, bent = scores_of(
            dot, i[None, :], j[:, None], queries, keys, rule, added, of_head, FLAGS, ALL
        )
        lse = lse_of(lse_ptr, i, queries, FLAGS[5])
        p = exponential(x * unit_of(rule, FLAGS) - lse[None, :], FLAGS[5])
        do = load_rows(do_ptr, start, stride_gs, queries, ALL, DV, BLOCK_M, v.shape[1])
        kept = None
        if FLAGS[4]:
            kept = tl.trans(kept_of(row + i, place, pitch, rule, BLOCK_N))
        if DV_WANTED:
            dropped = tl.where(kept, p, 0.0) if FLAGS[4] else p
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        if DK_WANTED:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            delta = tl.load(delta_ptr + i, mask=i < queries, other=0.0)
            ds = gradient_of(p, dp, delta[None, :], kept, rule, FLAGS)
            if FLAGS[2]:
                ds *= 1.0 - bent * bent
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def block_of_keys(
    program, order, lengths, shares, q, k, v, do, dk, dv, lse_ptr, delta_ptr, factor, rule, added,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, of those that are there, of BLOCK_N keys from one part of their query heads."""
    Sq, Sk, sequences, cu_q_ptr, cu_k_ptr = lengths
    heads, kv_heads, group, parts = shares
    tiles, all_heads, span = order
    tile, part = program_at(program, tiles, all_heads, span)
    place, k_begin, keys, q_begin, queries = sequence_at(
        tile, cu_k_ptr, cu_q_ptr, Sk, Sq, sequences, BLOCK_N
    )
    if place < keys:
        batch, part = part // (kv_heads * parts), part % (kv_heads * parts)
        blocks = blocks_seen(
            place, keys, queries, queries - keys - rule[4], rule[3], rule[2], FLAGS[1], FLAGS[0],
            BLOCK_N, BLOCK_M,
        )  # fmt: skip
        k_at = head_at(k, batch, part // parts, k_begin)
        v_at = head_at(v, batch, part // parts, k_begin)
        k_tile = load_rows(k_at, place, k[3], keys, False, D, BLOCK_N, BLOCK_D)
        v_tile = load_rows(v_at, place, v[3], keys, False, DV, BLOCK_N, BLOCK_DV)
        dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        share = group // parts
        for head in range(part * share, (part + 1) * share):
            row = (batch * heads + head).to(tl.int64) * Sq + q_begin
            for ALL in tl.static_range(1, -1, -1):
                dk_tile, dv_tile = take_queries(
                    dk_tile, dv_tile, k_tile, v_tile, head_at(q, batch, head, q_begin),
                    head_at(do, batch, head, q_begin), lse_ptr + row, delta_ptr + row, q[3], do[3],
                    place, place + tl.arange(0, BLOCK_N), row, queries, keys, (Sk + 3) // 4 * 4,
                    blocks, rule, added, added_to(added, batch, head, heads, FLAGS[5]), FLAGS,
                    dk[0] is not None, dv[0] is not None, D, DV, BLOCK_M, ALL,
                )  # fmt: skip
        if dk[0] is not None:
            dk_at = head_at(dk, batch, part, k_begin)
            store_rows(dk_at, dk_tile * factor, place, dk[3], keys, D)
        if dv[0] is not None:
            dv_at = head_at(dv, batch, part, k_begin)
            store_rows(dv_at, dv_tile * rule[7], place, dv[3], keys, DV)


@triton.jit
def take_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, i, row, queries, keys, pitch, blocks,
    rule, added, of_head, FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Add what blocks of keys, seen whole or in part, give to dq / scale [BLOCK_M, BLOCK_D]."""
    for step in range(count_of(blocks, ALL)):
        start = block_at(step, blocks, ALL) * BLOCK_N
        j = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, start, stride_ks, keys, ALL, D, BLOCK_N, q.shape[1])
        dot = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        x, bent = scores_of(
            dot, i[:, None], j[None, :], queries, keys, rule, added, of_head, FLAGS, ALL
        )
        p = exponential(x * unit_of(rule, FLAGS) - lse[:, None], FLAGS[5])
        v = load_rows(v_ptr, start, stride_vs, keys, ALL, DV, BLOCK_N, do.shape[1])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        kept = None
        if FLAGS[4]:
            kept = kept_of(row, start, pitch, rule, BLOCK_N)
        ds = gradient_of(p, dp, delta[:, None], kept, rule, FLAGS)
        if FLAGS[2]:
            ds *= 1.0 - bent * bent
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def block_of_queries(
    program, order, lengths, shares, q, k, v, do, dq, lse_ptr, delta_ptr, factor, rule, added,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    Sq, Sk, sequences, cu_q_ptr, cu_k_ptr = lengths
    heads, _, group, _ = shares
    tiles, all_heads, span = order
    ascending, head = program_at(program, tiles, all_heads, span)
    place, q_begin, queries, k_begin, keys = sequence_at(
        tiles - 1 - ascending, cu_q_ptr, cu_k_ptr, Sq, Sk, sequences, BLOCK_M
    )
    if place < queries:
        batch, head = head // heads, head % heads
        blocks = blocks_seen(
            place, queries, keys, keys - queries + rule[4], rule[2], rule[3], FLAGS[0], FLAGS[1],
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        row = (batch * heads + head).to(tl.int64) * Sq + q_begin
        i = place + tl.arange(0, BLOCK_M)
        lse = lse_of(lse_ptr + row, i, queries, FLAGS[5])
        delta = tl.load(delta_ptr + row + i, mask=i < queries, other=0.0)
        q_at, do_at = head_at(q, batch, head, q_begin), head_at(do, batch, head, q_begin)
        q_tile = load_rows(q_at, place, q[3], queries, False, D, BLOCK_M, BLOCK_D)
        do_tile = load_rows(do_at, place, do[3], queries, False, DV, BLOCK_M, BLOCK_DV)
        dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for ALL in tl.static_range(1, -1, -1):
            dq_tile = take_keys(
                dq_tile, q_tile, do_tile, lse, delta, head_at(k, batch, head // group, k_begin),
                head_at(v, batch, head // group, k_begin), k[3], v[3], i, row + i, queries, keys,
                (Sk + 3) // 4 * 4, blocks, rule, added,
                added_to(added, batch, head, heads, FLAGS[5]), FLAGS, D, DV, BLOCK_N, ALL,
            )  # fmt: skip
        dq_at = head_at(dq, batch, head, q_begin)
        store_rows(dq_at, dq_tile * factor, place, dq[3], queries, D)
