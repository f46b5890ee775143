"""Attention over keys and values a chunk at a time, which may live on the host.

    o_c, lse_c = attention of chunk c        lse = log(sum of exp(lse_c))
    o = sum of exp(lse_c - lse) o_c

The backward of a chunk needs lse and delta of the whole rows and nothing of the other chunks. The
device holds q, o, fp32 sums for o and dq, and two chunks of keys, values and their gradients: the
last one's are dropped when the next one's are there.
Source: Rabe and Staats, Self-attention does not need O(n²) memory (2021).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import chosen, implementation
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops.attention import Given, forward, gradients
from pyft.ops.shared.attention_input import (
    Window,
    as_autocast,
    bounds,
    check_scores,
    check_shapes,
)
from pyft.ops.shared.heads import empty_heads

_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? slopes, float scale, SymInt? left, "
    "SymInt? right, float? softcap, SymInt size, str name"
)


class _Call(NamedTuple):
    """The arguments of the op, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    slopes: Tensor | None
    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    size: int
    name: str

    def chunks(self) -> Iterator[tuple[slice, Given]]:
        """The chunks that some query sees, on its device; the sinks are with the first."""
        sq, sk = self.q.shape[2], self.k.shape[2]
        end = sk if self.right is None else max(0, min(sk, sk + self.right))
        first = 0 if self.left is None else min(end, max(0, sk - sq - self.left))
        sinks = self.sinks
        for start in range(first, end, self.size) or range(1):
            part = slice(start, min(end, start + self.size))
            k, v = (x[:, :, part].to(self.q.device, non_blocking=True) for x in (self.k, self.v))
            yield part, Given(
                self.q, k, v, sinks, None, self.slopes, None, None, None, self.scale, self.left,
                self.right, sk - part.stop, self.softcap, 0.0, self.name, [],
            )  # fmt: skip
            sinks = None


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    total, lse = None, None
    for _, given in call.chunks():
        o, row = forward(*given)
        if total is None or lse is None:
            total, lse = o.to(row.dtype), row
            continue
        whole = torch.logaddexp(lse, row)
        safe = whole.masked_fill(whole == -torch.inf, 0.0)
        total.mul_(torch.exp(lse - safe)[..., None]).add_(o * torch.exp(row - safe)[..., None])
        lse = whole
    assert total is not None
    assert lse is not None
    return empty_heads(call.q, call.v.shape[3]).copy_(total), lse


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    lse = call.q.new_empty(call.q.shape[:3], dtype=wide)
    return empty_heads(call.q, call.v.shape[3]), lse


def _gradients(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and sinks; those that are not wanted are empty."""
    call = _Call(*arguments)
    total = torch.zeros_like(call.q, dtype=lse.dtype) if wanted[0] else None
    dk, dv = (
        torch.zeros_like(x) if want else call.q.new_empty(0)
        for x, want in zip((call.k, call.v), wanted[1:3], strict=True)
    )
    dsinks = call.q.new_empty(0)
    for part, given in call.chunks():
        with_sinks = wanted[3] and given.sinks is not None
        found = gradients(do, dlse, o, lse, [*wanted[:3], with_sinks, False], *given)
        if total is not None:
            total += found[0]
        for into, chunk, want in zip((dk, dv), found[1:3], wanted[1:3], strict=True):
            if want:
                into[:, :, part] = chunk
        dsinks = found[3] if with_sinks else dsinks
    dq = call.q.new_empty(0) if total is None else empty_heads(call.q).copy_(total)
    return dq, dk, dv, dsinks


def _fake_gradients(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    empty = (empty_heads(call.q), *(None if x is None else torch.empty_like(x) for x in call[1:4]))
    return tuple(
        x if want and x is not None else call.q.new_empty(0)
        for x, want in zip(empty, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, o, lse = ctx.saved_tensors
    wanted = [x is not None and ctx.needs_input_grad[i] for i, x in enumerate(tensors[:4])]
    do = torch.zeros_like(o) if do is None else do
    found = _chunked_backward(do, dlse, o, lse, wanted, *tensors, *ctx.numbers)
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), *(None,) * 7


_chunked_backward = Primitive(
    "chunked_attention_backward",
    _gradients,
    _fake_gradients,
    schema=f"(Tensor do, Tensor? dlse, Tensor o, Tensor lse, bool[] wanted, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_chunked = Op(
    "chunked_attention",
    _forward,
    _fake,
    _save,
    _backward,
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
)


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """``pyft.attention`` over keys and values that are taken ``chunk_size`` keys at a time.

    Args:
        k, v: on q's device or on the CPU, pinned best; their gradients come back where they are.
            Chunks that no query sees are not fetched.
        chunk_size: keys of a chunk, at least 1.

    The others, what is returned and what is raised are ``attention``'s.
    """
    if chunk_size < 1:
        raise UsageError(f"chunked_attention: chunk_size is {chunk_size}; need at least 1")
    q, k, v = as_autocast(q, k, v)
    check_shapes(q, k, v, host=True)
    check_scores(q, k, softcap, sinks, None, alibi_slopes, 0.0)
    left, right = bounds(causal, window)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    call = _Call(
        q, k, v, sinks, alibi_slopes, scale, left, right, softcap, chunk_size, chosen()
    )  # fmt: skip
    if call.name == "reference":
        o, lse = implementation("chunked_attention", "reference").chunked_attention(*call[:-1])
    else:
        o, lse = _chunked(*call)
    return (o, lse) if return_lse else o
