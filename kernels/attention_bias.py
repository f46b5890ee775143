"""Gradient of the bias of ``kernels.attention``: of each value the sum of dS over what it served.

    dS = P (dP - delta)      P = exp(s - lse)      dP = kept(do vᵀ)

A program has a tile of the gradient, BLOCK_M queries by BLOCK_N keys, and goes through all that was
given the same values: the batch, heads, all blocks of queries, all of keys. Its sum is in fp32 in
registers, so two runs give the same bits. Bytes moved: q, k, v and do once for each tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
from pyft.kernels.attention_launch import (
    Rule,
    default_config,
    features_of,
    numbers_of,
    padded,
    strides_of,
)
from pyft.kernels.attention_tiles import (
    added_to,
    blocks_seen,
    exponential,
    gradient_of,
    head_at,
    kept_of,
    load_rows,
    lse_of,
    scores_of,
)


@triton.jit
def served(own, owners, count):
    """(first, end) of what is served by value ``own`` of as many as ``owners``: itself, or with one
    owner all ``count``.
    """
    return tl.where(owners > 1, own, 0), tl.where(owners > 1, own + 1, count)


@triton.jit(do_not_specialize=[
    "Sq", "Sk", "batch_count", "batch_owners", "head_owners", "query_owners", "key_owners", "left",
    "right", "shift", "seed", "threshold", "stride_bb", "stride_bh", "stride_bq",
])  # fmt: skip
def attention_bias_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, slopes_ptr, dbias_ptr, Sq, Sk,
    batch_count, heads, group, batch_owners, head_owners, query_owners, key_owners, scale, cap,
    left, right, shift, seed: tl.int64, threshold: tl.int64, keep, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh,
    stride_gs, stride_bb, stride_bh, stride_bq, stride_bk, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr, PRECISE: tl.constexpr,
    ALL_QUERIES: tl.constexpr, ALL_KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, which is contiguous; owners count the programs along each dimension, one
    where it has size 1. ALL_QUERIES, ALL_KEYS: it has no dimension of its own for them.
    """
    rule = (scale, cap, left, right, shift, seed, threshold, keep)
    FLAGS: tl.constexpr = (LEFT, RIGHT, SOFTCAP, SCALED, DROPOUT, PRECISE)
    added = (bias_ptr, slopes_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
    pitch = (Sk + 3) // 4 * 4
    tile = tl.program_id(0)
    own_key, tile = tile % key_owners, tile // key_owners
    own_query, tile = tile % query_owners, tile // query_owners
    own_head, own_batch = tile % head_owners, tile // head_owners
    first_batch, end_batch = served(own_batch, batch_owners, batch_count)
    first_head, end_head = served(own_head, head_owners, heads)
    first_query, end_query = served(own_query, query_owners, tl.cdiv(Sq, BLOCK_M))
    first_key, end_key = served(own_key, key_owners, tl.cdiv(Sk, BLOCK_N))

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch in range(first_batch, end_batch):
        for head in range(first_head, end_head):
            q_at = head_at((q_ptr, stride_qb, stride_qh, stride_qs), batch, head, 0)
            k_at = head_at((k_ptr, stride_kb, stride_kh, stride_ks), batch, head // group, 0)
            v_at = head_at((v_ptr, stride_vb, stride_vh, stride_vs), batch, head // group, 0)
            do_at = head_at((do_ptr, stride_gb, stride_gh, stride_gs), batch, head, 0)
            row = tl.cast(batch * heads + head, tl.int64) * Sq
            of_head = added_to(added, batch, head, heads, PRECISE)
            for query_tile in range(first_query, end_query):
                place = query_tile * BLOCK_M
                i = place + tl.arange(0, BLOCK_M)
                first, _, _, last = blocks_seen(
                    place, Sq, Sk, Sk - Sq + shift, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
                )
                lse = lse_of(lse_ptr + row, i, Sq, PRECISE)
                delta = tl.load(delta_ptr + row + i, mask=i < Sq, other=0.0)
                q = load_rows(q_at, place, stride_qs, Sq, False, D, BLOCK_M, BLOCK_D)
                do = load_rows(do_at, place, stride_gs, Sq, False, DV, BLOCK_M, BLOCK_DV)
                for key_tile in range(tl.maximum(first, first_key), tl.minimum(last, end_key)):
                    start = key_tile * BLOCK_N
                    j = start + tl.arange(0, BLOCK_N)
                    k = load_rows(k_at, start, stride_ks, Sk, False, D, BLOCK_N, BLOCK_D)
                    v = load_rows(v_at, start, stride_vs, Sk, False, DV, BLOCK_N, BLOCK_DV)
                    dot = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
                    x, _bent = scores_of(
                        dot, i[:, None], j[None, :], Sq, Sk, rule, added, of_head, FLAGS, False
                    )  # fmt: skip
                    p = exponential(x - lse[:, None], PRECISE)
                    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                    kept = None
                    if DROPOUT:
                        kept = kept_of(row + i, start, pitch, rule, BLOCK_N)
                    acc += gradient_of(p, dp, delta[:, None], kept, rule, FLAGS)

    if ALL_QUERIES:
        acc = tl.sum(acc, axis=0, keep_dims=True)
    if ALL_KEYS:
        acc = tl.sum(acc, axis=1, keep_dims=True)
    rows = 1 if ALL_QUERIES else Sq
    cols = 1 if ALL_KEYS else Sk
    offs_m = own_query * BLOCK_M + tl.arange(0, acc.shape[0])[:, None]
    offs_n = own_key * BLOCK_N + tl.arange(0, acc.shape[1])[None, :]
    at = ((own_batch * head_owners + own_head).to(tl.int64) * rows + offs_m) * cols + offs_n
    mask = (offs_m < rows) & (offs_n < cols)
    tl.store(dbias_ptr + at, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


def attention_bias_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor,
    slopes: Tensor | None,
    rule: Rule,
    dbias: Tensor,
    config: configs.Attention | None = None,
) -> None:
    """What ``attention_backward`` takes -> dbias, contiguous, of the bias's dtype and of its shape
    [B, Hq, Sq, Sk] but for 1 where one value serves all of a dimension.
    """
    if dbias.numel() == 0:
        return
    (batch, heads, sq, d), (kv_heads, sk, v_dim) = q.shape, v.shape[1:]
    tile = (config or default_config(q, max(d, v_dim), rule, bias, slopes)).queries
    own_b, own_h, own_q, own_k = dbias.shape
    owners = (own_b, own_h, triton.cdiv(own_q, tile.block_m), triton.cdiv(own_k, tile.block_n))
    attention_bias_backward_kernel[(owners[0] * owners[1] * owners[2] * owners[3],)](
        q, k, v, do, lse, delta, bias, slopes, dbias, sq, sk, batch, heads,
        heads // max(1, kv_heads), *owners, *numbers_of(rule, q.dtype), *strides_of(q, k, v, do),
        *bias.stride(), D=d, DV=v_dim, BLOCK_D=padded(d), BLOCK_DV=padded(v_dim),
        **features_of(rule, q.dtype, bias, slopes), ALL_QUERIES=own_q != sq, ALL_KEYS=own_k != sk,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
