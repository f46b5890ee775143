"""Gradients of q, k and v of ``kernels.attention``, which saves lse, with delta = sum(o do) - dlse.

    P = exp(s - lse)      dP = kept(do vᵀ)      dS = P (dP - delta), times 1 - tanh² with a softcap
    dq = scale dS k       dk = scale dSᵀ q      dv = dropped(P)ᵀ do

Two passes, each of which recomputes P and dP: a program of the first has a block of keys of one
key head and goes through the query heads that share it and their blocks of queries; a program of
the second has a block of queries and goes through the keys. So sums are in registers, in fp32, no
two programs write to one place, and two runs give the same bits: 7 matmuls where atomic additions
to dq in memory would need 5. One launch does both, the keys first, or each has its own.

Bytes moved: as the forward, twice. Temporary memory: none, but where the blocks of keys are too few
for the GPU: there programs share the query heads of a key head, and what they find, in fp32, is
added up in the order of the heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs
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
from pyft.kernels.attention_passes import block_of_keys, block_of_queries
from pyft.kernels.attention_tiles import head_at, load_rows, store_rows


@triton.jit(do_not_specialize=[
    "Sq", "Sk", "sequences", "key_heads", "query_heads", "key_tiles", "query_tiles", "key_span",
    "query_span", "key_programs", "parts", "left", "right", "shift", "seed", "threshold",
    "stride_bb", "stride_bh", "stride_bq",
])  # fmt: skip
def attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr,
    dq_ptr, dk_ptr, dv_ptr, Sq, Sk, sequences, heads, kv_heads, group, parts, key_heads,
    query_heads, key_tiles, query_tiles, key_span, query_span, key_programs, factor, scale, cap,
    left, right, shift, seed: tl.int64, threshold: tl.int64, keep, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh,
    stride_gs, stride_bb, stride_bh, stride_bq, stride_bk, stride_dqb, stride_dqh, stride_dqs,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISE: tl.constexpr, KEYS_M: tl.constexpr, KEYS_N: tl.constexpr, QUERIES_M: tl.constexpr,
    QUERIES_N: tl.constexpr,
):  # fmt: skip
    """Of the first ``key_programs`` each has KEYS_N keys and a part of the query heads that share
    them, of the others QUERIES_M queries each. dk and dv have ``parts`` heads for each of k. factor
    is the scale that dq and dk are yet to be multiplied by.
    """
    rule = (scale, cap, left, right, shift, seed, threshold, keep)
    FLAGS: tl.constexpr = (LEFT, RIGHT, SOFTCAP, SCALED, DROPOUT, PRECISE)
    added = (bias_ptr, slopes_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
    lengths = (Sq, Sk, sequences, cu_q_ptr, cu_k_ptr)
    shares = (heads, kv_heads, group, parts)
    q = (q_ptr, stride_qb, stride_qh, stride_qs)
    k = (k_ptr, stride_kb, stride_kh, stride_ks)
    v = (v_ptr, stride_vb, stride_vh, stride_vs)
    do = (do_ptr, stride_gb, stride_gh, stride_gs)
    dq = (dq_ptr, stride_dqb, stride_dqh, stride_dqs)
    dk = (dk_ptr, stride_dkb, stride_dkh, stride_dks)
    dv = (dv_ptr, stride_dvb, stride_dvh, stride_dvs)
    program = tl.program_id(0)
    if program < key_programs:
        if (dk_ptr is not None) or (dv_ptr is not None):
            block_of_keys(
                program, (key_tiles, key_heads, key_span), lengths, shares, q, k, v, do, dk, dv,
                lse_ptr, delta_ptr, factor, rule, added, FLAGS, D, DV, BLOCK_D, BLOCK_DV, KEYS_M,
                KEYS_N,
            )  # fmt: skip
    elif dq_ptr is not None:
        block_of_queries(
            program - key_programs, (query_tiles, query_heads, query_span), lengths, shares, q, k,
            v, do, dq, lse_ptr, delta_ptr, factor, rule, added, FLAGS, D, DV, BLOCK_D, BLOCK_DV,
            QUERIES_M, QUERIES_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S", "parts"])
def sum_parts_kernel(
    parts_ptr, out_ptr, S, heads, parts, stride_ob, stride_oh, stride_os, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one head: fp32 [B, H, parts, S, D], contiguous, summed over parts."""
    blocks = tl.cdiv(S, BLOCK)
    head, place = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    parts_ptr += head.to(tl.int64) * parts * S * D
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for part in range(parts):
        part_ptr = parts_ptr + tl.cast(part, tl.int64) * S * D
        total += load_rows(part_ptr, place, D, S, False, D, BLOCK, BLOCK_D)
    out_at = head_at((out_ptr, stride_ob, stride_oh, stride_os), head // heads, head % heads, 0)
    store_rows(out_at, total, place, stride_os, S, D)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rule: Rule,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    config: configs.Attention | None = None,
) -> None:
    """do [B, Hq, Sq, Dv] and what the forward had and gave -> dq, dk, dv, each as q, k, v or None;
    all with adjacent last dimensions, lse and delta fp32 [B, Hq, Sq], contiguous.
    """
    (batch, heads, sq, d), (kv_heads, sk, v_dim) = q.shape, v.shape[1:]
    config = config or default_config(q, max(d, v_dim), rule, bias, slopes)
    keys, queries, group = config.keys, config.queries, heads // max(1, kv_heads)
    key_tiles = tiles_of(sk, cu_k, keys.block_n) if sk else 0
    query_tiles = tiles_of(sq, cu_q, queries.block_m) if sq else 0
    parts = parts_of(group, key_tiles * batch * kv_heads, config.programs)
    key_heads = batch * kv_heads * parts
    dk_part, dv_part = (_in_parts(x, parts) for x in (dk, dv))

    def launch(dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, tile: configs.Tile) -> None:
        key_programs = 0 if dk is None and dv is None else key_tiles * key_heads
        query_programs = 0 if dq is None else query_tiles * batch * heads
        if key_programs + query_programs == 0:
            return
        attention_backward_kernel[(key_programs + query_programs,)](
            q, k, v, do, lse, delta, bias, slopes, cu_q, cu_k, dq, dk, dv, sq, sk,
            0 if cu_q is None else len(cu_q) - 1, heads, kv_heads, group, parts, key_heads,
            batch * heads, key_tiles, query_tiles, max(1, heads_at_once(q, do, 1) // group) * parts,
            heads_at_once(k, v, group), key_programs, rule[0], *numbers_of(rule, q.dtype),
            *strides_of(q, k, v, do), *((0, 0, 0, 0) if bias is None else bias.stride()),
            *strides_of(dq, dk, dv), D=d, DV=v_dim, BLOCK_D=padded(d), BLOCK_DV=padded(v_dim),
            **features_of(rule, q.dtype, bias, slopes), KEYS_M=keys.block_m, KEYS_N=keys.block_n,
            QUERIES_M=queries.block_m, QUERIES_N=queries.block_n, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip

    if config.fused:
        launch(dq, dk_part, dv_part, keys)
    else:
        launch(None, dk_part, dv_part, keys)
        launch(dq, None, None, queries)
    for part, out in ((dk_part, dk), (dv_part, dv)):
        if part is not None and out is not None and part is not out:
            _sum_parts(part, parts, out)


def parts_of(group: int, programs: int, wanted: int) -> int:
    """Into how many parts a group's query heads are split: the fewest that give enough programs."""
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if parts * programs >= wanted), max(1, group))


def _in_parts(x: Tensor | None, parts: int) -> Tensor | None:
    """x itself, or fp32 memory for a part of it from each part of the group."""
    if x is None or parts == 1:
        return x
    batch, heads, seq, d = x.shape
    return torch.empty(batch, heads * parts, seq, d, dtype=torch.float32, device=x.device)


def _sum_parts(partial: Tensor, parts: int, out: Tensor) -> None:
    batch, heads, seq, d = out.shape
    block = max(1, configs.ATTENTION_DELTA.tile // padded(d))
    if out.numel():
        sum_parts_kernel[(batch * heads * triton.cdiv(seq, block),)](
            partial, out, seq, heads, parts, *strides_of(out), D=d, BLOCK_D=padded(d), BLOCK=block,
            num_warps=configs.ATTENTION_DELTA.num_warps,
        )  # fmt: skip
