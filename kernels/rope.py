"""Rotary position embedding of queries and keys in one launch.

    first' = first cos - second sin        second' = second cos + first sin

of pairs (i, i + R / 2), or (2 i, 2 i + 1) where interleaved, of the first R of D dimensions; the
others are copied, or left where they are in place. The backward turns by the negative angle.

A program has one token and BLOCK_H heads of q or of k, whose angles are read once. Bytes moved: q
and k read and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyft.kernels import configs


@triton.jit
def turn_heads(
    x_ptr, out_ptr, head, mask_h, cos, sin, stride_xh, stride_oh, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn and copy one token's heads [BLOCK_H]; cos, sin [BLOCK_HALF] in fp32."""
    x_ptrs = x_ptr + head.to(tl.int64)[:, None] * stride_xh
    out_ptrs = out_ptr + head.to(tl.int64)[:, None] * stride_oh
    if HALF > 0:
        if INTERLEAVED:
            cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = mask_h[:, None] & (cols < 2 * HALF)
            pairs = tl.load(x_ptrs + cols, mask=mask, other=0.0).to(tl.float32)
            first, second = tl.split(pairs.reshape(head.shape[0], BLOCK_HALF, 2))
        else:
            cols = tl.arange(0, BLOCK_HALF)[None, :]
            mask = mask_h[:, None] & (cols < HALF)
            first = tl.load(x_ptrs + cols, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x_ptrs + HALF + cols, mask=mask, other=0.0).to(tl.float32)
        turned_first = first * cos[None, :] - second * sin[None, :]
        turned_second = second * cos[None, :] + first * sin[None, :]
        dtype = out_ptr.dtype.element_ty
        if INTERLEAVED:
            turned = tl.join(turned_first, turned_second).reshape(head.shape[0], 2 * BLOCK_HALF)
            tl.store(out_ptrs + cols, turned.to(dtype), mask=mask)
        else:
            tl.store(out_ptrs + cols, turned_first.to(dtype), mask=mask)
            tl.store(out_ptrs + HALF + cols, turned_second.to(dtype), mask=mask)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        mask_rest = mask_h[:, None] & (rest < REST)
        x = tl.load(x_ptrs + 2 * HALF + rest, mask=mask_rest)
        tl.store(out_ptrs + 2 * HALF + rest, x, mask=mask_rest)


@triton.jit(do_not_specialize=["S"])
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr, S, q_heads, k_heads, sign,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_cb, stride_cs,
    stride_nb, stride_ns, stride_pb, stride_ps, stride_qob, stride_qoh, stride_qos,
    stride_kob, stride_koh, stride_kos, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Axis 0: tokens; axis 1: blocks of q's heads, then of k's. sign: 1, or -1 for the inverse."""
    b = (tl.program_id(0) // S).to(tl.int64)
    s = (tl.program_id(0) % S).to(tl.int64)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    if positions_ptr is None:
        cos_row, sin_row = b * stride_cb + s * stride_cs, b * stride_nb + s * stride_ns
    else:
        position = tl.load(positions_ptr + b * stride_pb + s * stride_ps)
        cos_row, sin_row = position * stride_cs, position * stride_ns
    offs = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + cos_row + offs, mask=offs < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_row + offs, mask=offs < HALF, other=0.0).to(tl.float32) * sign
    if tl.program_id(1) < q_blocks:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        turn_heads(
            q_ptr + b * stride_qb + s * stride_qs, q_out_ptr + b * stride_qob + s * stride_qos,
            head, head < q_heads, cos, sin, stride_qh, stride_qoh, HALF, BLOCK_HALF, REST,
            BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    elif k_ptr is not None:
        head = (tl.program_id(1) - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        turn_heads(
            k_ptr + b * stride_kb + s * stride_ks, k_out_ptr + b * stride_kob + s * stride_kos,
            head, head < k_heads, cos, sin, stride_kh, stride_koh, HALF, BLOCK_HALF, REST,
            BLOCK_REST, INTERLEAVED,
        )  # fmt: skip


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    q_out: Tensor,
    k_out: Tensor | None,
    config: configs.Rope = configs.ROPE,
) -> None:
    """q [B, Hq, S, D], k [B, Hk, S, D] -> q_out, k_out, which may be q and k themselves.

    cos, sin [B or 1, S, R / 2], or with positions int64 [B, S] tables [P, R / 2]. Adjacent last
    dimensions, any other strides.
    """
    (batch, q_heads, seq, dim), half = q.shape, cos.shape[-1]
    k_heads = 0 if k is None else k.shape[1]
    if batch * seq * (q_heads + k_heads) * dim == 0:
        return
    in_place = all(
        x is None or y is None or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride())
        for x, y in ((q, q_out), (k, k_out))
    )
    rest = 0 if in_place else dim - 2 * half
    most = triton.next_power_of_2(max(q_heads, k_heads))
    block_h = min(most, max(1, config.tile // triton.next_power_of_2(dim)))
    rope_kernel[(batch * seq, triton.cdiv(q_heads, block_h) + triton.cdiv(k_heads, block_h))](
        q, k, cos, sin, positions, q_out, k_out, seq, q_heads, k_heads, -1.0 if inverse else 1.0,
        *_strides(q), *_strides(k), *_table_strides(cos), *_table_strides(sin),
        *((0, 0) if positions is None else positions.stride()), *_strides(q_out), *_strides(k_out),
        HALF=half, BLOCK_HALF=triton.next_power_of_2(max(1, half)), REST=rest,
        BLOCK_REST=triton.next_power_of_2(max(1, rest)), BLOCK_H=block_h, INTERLEAVED=interleaved,
        num_warps=config.num_warps,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of batch, heads and tokens."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Of batch, 0 where all share one, and tokens (or positions)."""
    if table.dim() == 2:
        return 0, table.stride(0)
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1)
