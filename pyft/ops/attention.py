"""Attention of grouped heads whose backward keeps row sums and nothing else.

    S = scale q kᵀ, softcapped, + bias - slope |p - j|        P = exp(S - lse)        o = P v
    delta = rowsum(dO o) - dlse        dS = P (dO vᵀ - delta)
    dq = scale dS k        dk = scale dSᵀ q        dv = Pᵀ dO        dbias = dS
    dsink = - sum of exp(sink - lse) delta

Saved: q, k, v, o and lse, fp32 [B, Hq, Sq]. The backward adds delta, as large as lse; P and dS
exist a tile at a time, keys and values are never repeated for the query heads of their group. Too
few blocks of keys for a GPU have their gradients made in parts, in fp32; a thread of a CPU sums dk
and dv of one head in fp32 where that is no more than half of the gradients, or 2 MiB.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Rabe and Staats,
Self-attention does not need O(n²) memory (2021); Dao, FlashAttention-2 (2023). Sinks: Xiao et al.,
Efficient Streaming Language Models with Attention Sinks (2023). ALiBi: Press et al. (2022).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import chosen, device_guard, implementation, launcher
from pyft.op import Op, Primitive, plain
from pyft.ops.dropout import as_seed
from pyft.ops.shared.attention_input import (
    Window,
    as_autocast,
    bounds,
    check_buffers,
    check_packed,
    check_scores,
    check_shapes,
)
from pyft.ops.shared.heads import adjacent, empty_heads

CUDA_DIM, CUDA_LENGTH = 256, 2**29  # the most dimensions and tokens of a head of the CUDA kernels
_LEAVES = ("q", "k", "v", "sinks", "bias")  # what gets a gradient: the first arguments


class Rule(NamedTuple):
    """What happens to scores: numbers only. ``left`` and ``right`` None: no bound."""

    scale: float
    left: int | None
    right: int | None
    shift: int
    softcap: float | None
    dropout_p: float

    def for_kernels(self, seed: Tensor | None) -> tuple[Any, ...]:
        """With dropout as the kernels take it: seed, threshold and the scale of what is kept."""
        if seed is None:
            return (*self[:5], None)
        threshold = implementation("dropout", "reference").threshold(self.dropout_p)
        return (*self[:5], (int(seed), threshold, 1.0 / (1.0 - self.dropout_p)))


class Given(NamedTuple):
    """The arguments of the op, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    scale: float
    left: int | None
    right: int | None
    shift: int
    softcap: float | None
    dropout_p: float
    name: str
    buffers: list[Tensor | None]  # for o, dq, dk and dv; or empty

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What gets a gradient."""
        return self[: len(_LEAVES)]  # type: ignore[return-value]

    @property
    def rule(self) -> Rule:
        """What happens to scores."""
        return Rule(*self[9:15])  # type: ignore[arg-type]

    def kernels(self) -> Any:
        """The module that runs this call; None: the reference."""
        return launcher("attention", self.q, self.name, self._refusal)

    def _refusal(self, name: str) -> str | None:
        """Why a backend that is here cannot run this call; None when it can."""
        if name not in ("cuda", "triton"):
            return None
        dim, length = max(self.q.shape[3], self.v.shape[3]), max(self.q.shape[2], self.k.shape[2])
        newer = self.q.is_cuda and torch.cuda.get_device_capability(self.q.device) >= (8, 0)
        if name == "triton":
            too_large = self.q.dtype == torch.float32 and dim > CUDA_DIM and self.q.is_cuda
            if too_large and not newer and torch.version.hip is None:
                return f"in fp32 heads of more than {CUDA_DIM} dimensions do not fit this GPU"
            return None
        if self.bias is not None or self.slopes is not None or self.seed is not None:
            return "its kernels have no bias, ALiBi slopes or dropout"
        if dim > CUDA_DIM:
            return f"its kernels have heads of at most {CUDA_DIM} dimensions"
        if length > CUDA_LENGTH:
            return f"its kernels have sequences of at most {CUDA_LENGTH} tokens"
        if self.q.dtype != torch.float16 and not (newer and self.q.dtype == torch.bfloat16):
            return f"its kernels do not run in {self.q.dtype} on this GPU"
        return None

    @property
    def as_reference_takes(self) -> tuple[Any, ...]:
        """The arguments of the reference."""
        seed = 0 if self.seed is None else int(self.seed)
        scores = (self.sinks, self.bias, self.slopes, self.cu_q, self.cu_k, self.dropout_p, seed)
        return self.q, self.k, self.v, *self.rule[:5], *scores

    def tables(self) -> tuple[Tensor | None, ...]:
        """Slopes and boundaries as the kernels take them."""
        b, hq = self.q.shape[:2]
        slopes = self.slopes
        if slopes is not None:
            slopes = slopes.float().expand(b, hq).contiguous()
        cu = (None if c is None else c.to(torch.int32).contiguous() for c in (self.cu_q, self.cu_k))
        return slopes, *cu

    def wide_bias(self) -> Tensor | None:
        """A view [B, Hq, Sq, Sk], of stride 0 where one value serves all."""
        if self.bias is None:
            return None
        shape = (*self.q.shape[:3], self.k.shape[2])
        strides = [
            0 if size == 1 else stride
            for size, stride in zip(self.bias.shape, self.bias.stride(), strict=True)
        ]
        return self.bias.as_strided(shape, strides)


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? slopes, Tensor? cu_q, "
    "Tensor? cu_k, Tensor? seed, float scale, SymInt? left, SymInt? right, SymInt shift, "
    "float? softcap, float dropout_p, str name, Tensor?[] buffers"
)


def _alias(x: Tensor) -> Tensor:
    """The same memory, and no view: what is written beside it later does not change it."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload, no-any-return]


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """o and lse of a ``Given``, without autograd."""
    given = Given(*arguments)
    q, k, v = map(adjacent, given[:3])
    out = given.buffers[0] if given.buffers else None
    o = empty_heads(q, v.shape[3]) if out is None else _alias(out)
    kernels = given.kernels()
    if kernels is None:
        function = implementation("attention", "reference").attention
        found, lse = function(*given.as_reference_takes)
        return o.copy_(found), lse
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel():
        slopes, cu_q, cu_k = given.tables()
        sinks = None if given.sinks is None else given.sinks.float().contiguous()
        rule = given.rule.for_kernels(given.seed)
        with device_guard(q):
            kernels.attention(
                q, k, v, sinks, given.wide_bias(), slopes, cu_q, cu_k, rule, o, lse
            )  # fmt: skip
    return o, lse


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = Given(*arguments)
    wide = torch.promote_types(given.q.dtype, torch.float32)
    lse = given.q.new_empty(given.q.shape[:3], dtype=wide)
    return empty_heads(given.q, given.v.shape[3]), lse


def gradients(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and bias of a ``Given``; those that are not wanted are empty. o
    and lse are of whole rows, of which k and v may be a part.
    """
    given = Given(*arguments)
    if dlse is not None:  # where nothing is seen lse is constant
        dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
    buffers = given.buffers[1:] or [None] * 3
    kernels = given.kernels()
    if kernels is None:
        backward = implementation("attention", "reference").attention_backward
        found = backward(do, dlse, o, lse, *given.as_reference_takes)
        heads = (
            (empty_heads(x) if buffer is None else buffer).copy_(x)
            for x, buffer in zip(found[:3], buffers, strict=True)
        )
        return tuple(
            x if want else do.new_empty(0)
            for x, want in zip((*heads, *found[3:]), wanted, strict=True)
        )
    q, k, v, do = map(adjacent, (*given[:3], do))
    delta = torch.empty_like(lse)
    slopes, cu_q, cu_k = given.tables()
    rule, bias = given.rule.for_kernels(given.seed), given.wide_bias()
    dsinks, dbias = do.new_empty(0), do.new_empty(0)
    with device_guard(q):
        if delta.numel():
            kernels.attention_delta(o, do, dlse, delta)
        if wanted[3] and given.sinks is not None:
            dsinks = _of_sinks(given.sinks, lse, delta)
        into = [
            None if not want else empty_heads(x) if buffer is None else buffer
            for x, want, buffer in zip((q, k, v), wanted[:3], buffers, strict=True)
        ]
        if not lse.numel():  # no query
            for x in into:
                if x is not None:
                    x.zero_()
        elif any(x is not None and x.numel() for x in into):
            kernels.attention_backward(
                q, k, v, do, lse, delta, bias, slopes, cu_q, cu_k, rule, *into
            )  # fmt: skip
        if wanted[4] and given.bias is not None:
            dbias = given.bias.new_empty(given.bias.shape)
            if dbias.numel():
                kernels.attention_bias_backward(
                    q, k, v, do, lse, delta, bias, slopes, rule, dbias
                )  # fmt: skip
    dq, dk, dv = (do.new_empty(0) if x is None else x for x in into)
    return dq, dk, dv, dsinks, dbias


def _of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Made before the gradients of q, k and v: there is room for one more tensor like lse."""
    share = (sinks.float()[:, None] - lse).exp_().mul_(delta)
    share.masked_fill_(lse == -torch.inf, 0.0)
    return share.sum(dim=(0, 2)).neg_().to(sinks.dtype)


def _fake_gradients(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    given = Given(*arguments)
    delta = torch.empty_like(lse)
    found = [
        (empty_heads(x) if i < 3 else x.new_empty(x.shape))
        if want and x is not None
        else do.new_empty(0)
        for i, (x, want) in enumerate(zip(given.leaves, wanted, strict=True))
    ]
    del delta
    return tuple(found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = Given(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given[:9], *output)
    ctx.numbers = given[9:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, o, lse = ctx.saved_tensors
    wanted = [
        x is not None and ctx.needs_input_grad[i] for i, x in enumerate(tensors[: len(_LEAVES)])
    ]
    do = torch.zeros_like(o) if do is None else do
    found = _attention_backward(do, dlse, o, lse, wanted, *tensors, *ctx.numbers)
    gradients = [x if want else None for x, want in zip(found, wanted, strict=True)]
    return *gradients, *(None,) * (len(Given._fields) - len(_LEAVES))


_attention_backward = Primitive(
    "attention_backward",
    gradients,
    _fake_gradients,
    schema=f"(Tensor do, Tensor? dlse, Tensor o, Tensor lse, bool[] wanted, {_SCHEMA}) "
    f"-> ({', '.join(['Tensor'] * len(_LEAVES))})",
)
_attention = Op(
    "attention", forward, _fake, _save, _backward, schema=f"({_SCHEMA}) -> (Tensor, Tensor)"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    shift: int = 0,
    out: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
) -> Any:
    """softmax(scale q kᵀ) v, differentiable, in memory that grows with the length, not its square.

    Query i of a sequence with Sq queries and Sk keys stands at p = i + Sk - Sq: the last query at
    the last key. A query that sees no key gives 0.

    Args:
        q: [B, Hq, Sq, D], any floating dtype, any strides. Under autocast q, k and v are cast to
            its dtype.
        k, v: [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] of q's dtype; Hkv divides Hq, and query head h
            reads head h // (Hq / Hkv).
        causal: query i sees keys j <= p.
        scale: of q kᵀ; None: 1 / sqrt(D).
        window: W: the last W keys up to p, p itself included, and without ``causal`` W - 1 after
            it; (left, right): p - left <= j <= p + right, None for no bound.
        softcap: scores become softcap tanh(score / softcap).
        sinks: [Hq], a score that takes part in each softmax of its head and has no value.
        bias: added to the scores: [B, Hq, Sq, Sk], 1 in place of any size; floating; may hold
            -infinity. Not with cu_seqlens.
        alibi_slopes: [Hq] or [B, Hq]; a score is lowered by slope |p - j|. They get no gradient.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [n + 1], ascending from 0 to Sq and to Sk: where
            n sequences begin and end that follow one another along S, each blind to the others; B
            is 1. cu_seqlens_k may be left out where it is the same. Checked on a CPU only: a GPU
            would have to be waited for, and leaves what is in no sequence unwritten.
        max_seqlen_q, max_seqlen_k: the longest sequence, which callers of other libraries have at
            hand; no kernel here needs it. Checked on a CPU.
        dropout_p: probability of leaving a pair of query and key out; 0 <= dropout_p < 1.
        seed: decides which: an integer (its low 64 bits) or an int64 tensor [] on the CPU; None
            draws one from torch's CPU generator. The same on every backend.
        return_lse: also return the log-sum-exp of each row's scores.
        shift: added to p: of keys that are a part of a longer sequence.
        out: o is written here, [B, Hq, Sq, Dv] of any strides but the last, and returned; it is to
            stay as it is until the backward, and shares nothing with q, k and v.
        gradients: the backward writes the gradients of q, k and v here, of their shapes and any
            strides but the last; not under torch.compile, a dispatch mode or backend("reference").

    Returns:
        o [B, Hq, Sq, Dv] of q's dtype, in memory [B, Sq, Hq, Dv]; with ``return_lse`` also lse,
        fp32 [B, Hq, Sq], natural logarithm, sinks included, -infinity where nothing is seen. Both
        are differentiable.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit; a backend asked for by name that
            cannot run.
    """
    q, k, v = as_autocast(q, k, v)
    check_shapes(q, k, v)
    check_scores(q, k, softcap, sinks, bias, alibi_slopes, dropout_p)
    cu_q, cu_k = check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias)
    left, right = bounds(causal, window)
    buffers = check_buffers(q, k, v, out, gradients)
    given = Given(
        q, k, v, sinks, None if bias is None else _dense(bias, q.dtype), alibi_slopes, cu_q, cu_k,
        as_seed(seed) if dropout_p > 0 else None,
        q.shape[3] ** -0.5 if scale is None else float(scale),
        left, right, shift, softcap, dropout_p, chosen(), buffers,
    )  # fmt: skip
    if given.name == "reference":
        buffers = []
        o, lse = implementation("attention", "reference").attention(*given.as_reference_takes)
    else:
        if buffers and not plain(given):  # an op that is watched writes to nothing
            buffers = []
        o, lse = _attention(*given._replace(buffers=buffers))
    if out is not None and not buffers:
        o = out.copy_(o)
    return (o, lse) if return_lse else o


def _dense(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Of four dimensions, in a dtype of the kernels; each value in its own place if it has a
    gradient, for an expanded tensor has one for each.
    """
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if bias.dtype == torch.float64 != dtype:
        bias = bias.float()
    sizes = zip(bias.shape, bias.stride(), strict=True)
    if bias.requires_grad and any(size > 1 and stride == 0 for size, stride in sizes):
        return bias.contiguous()
    return bias
