"""What every implementation of attention must do, forward and backward: the error rule, with the
reference in float64 as the truth, on tensors of the layouts that models have, among NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from attention_grid import CASES, Attention
from error_rule import broken_rule
from stored_weights import DTYPES, Output
from torch import Tensor

from pyft.reference import attention as reference
from pyft.reference.dropout import threshold

__all__ = ["CASES", "check", "check_far"]

Dropout = tuple[int, int, float]  # seed, threshold, keep
# scale, left, right, shift, softcap, dropout
Rule = tuple[float, int | None, int | None, int, float | None, Dropout | None]

SEED = 2**40 + 5
LARGE = 40.0  # times q: scores of more than a hundred, whose exp overflows
FAR = 2**30  # elements from head to head: the third is beyond 2^31


class AttentionKernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.attention``."""

    def attention(
        self,
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
    ) -> None:
        """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] -> o, lse [B, Hq, Sq]."""

    def attention_delta(self, o: Tensor, do: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
        """The sum of o do over Dv, less dlse -> delta [B, Hq, Sq]."""

    def attention_backward(
        self,
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
    ) -> None:
        """The gradients that are there, shaped as q, k and v."""

    def attention_bias_backward(
        self,
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
    ) -> None:
        """-> dbias, of size 1 where the bias has stride 0."""


@dataclass(frozen=True)
class Inputs:
    """On the CPU; the bias with 1 where it is broadcast."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None


def check(case: Attention, kernels: AttentionKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    given = _inputs(case)
    found, wrong = _run(case, kernels, device, given)
    expected = _reference(case, given, DTYPES[case.dtype])
    truth = _reference(case, given, torch.float64)
    first_q, first_k = case.lengths[0] if case.content == "alien" else (0, 0)
    for name, got in found.items():
        parts = [t if name == "dbias" else t[:, :, first_k if name in ("dk", "dv") else first_q :]
                 for t in (got, expected[name], truth[name])]  # fmt: skip
        if name == "lse":
            empty = parts[2] == -torch.inf
            if not torch.equal(parts[0] == -torch.inf, empty):
                wrong += "lse is -infinity elsewhere; "
            parts = [part.masked_fill(empty, 0.0) for part in parts]
        wrong += broken_rule(name, *parts)
    if case.repeat:
        again, _ = _run(case, kernels, device, given)
        wrong += "".join(f"{n} differs; " for n in found if not torch.equal(found[n], again[n]))
    return wrong


def check_far(kernels: AttentionKernels, device: torch.device) -> str:
    """What is wrong where heads lie so far from each other that 32 bits do not reach: the same bits
    as nearby are right. All tensors share 4 GiB, of which next to nothing is touched.
    """
    shape, element = (1, 3, 5, 16), torch.float16
    size = FAR * (shape[1] - 1) + 2**10
    if device.type == "cpu":
        memory = torch.from_numpy(np.empty(size, dtype=np.float16))
    else:
        memory = torch.empty(size, dtype=element, device=device)

    def far(place: int) -> Tensor:
        return memory.as_strided(shape, (1, FAR, shape[3], 1), place * shape[2] * shape[3])

    def near(place: int) -> Tensor:
        return torch.empty(shape, dtype=element, device=device)

    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator).to(element) for _ in range(4)]

    def run(make: Callable[[int], Tensor]) -> list[Tensor]:
        tensors = [make(place) for place in range(8)]
        for tensor, value in zip(tensors, values, strict=False):
            tensor.copy_(value)
        q, k, v, do, o, dq, dk, dv = tensors
        lse, delta = (torch.empty(shape[:3], device=device) for _ in range(2))
        rule = (0.25, None, 0, 0, None, None)
        kernels.attention(q, k, v, None, None, None, None, None, rule, o, lse)
        kernels.attention_delta(o, do, None, delta)
        kernels.attention_backward(
            q, k, v, do, lse, delta, None, None, None, None, rule, dq, dk, dv
        )
        return [x.cpu() for x in (o, lse, delta, dq, dk, dv)]

    pairs = zip(("o", "lse", "delta", "dq", "dk", "dv"), run(far), run(near), strict=True)
    return "".join(f"{name} differs; " for name, a, b in pairs if not torch.equal(a, b))


def _inputs(case: Attention) -> Inputs:
    generator = torch.Generator().manual_seed(sum(case.sizes) + sum(case.dims) + case.batch)
    dtype, (sq, sk), (hq, hkv), (d, dv) = DTYPES[case.dtype], case.sizes, case.heads, case.dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = normal(case.batch, hq, sq, d), normal(case.batch, hkv, sk, d)
    v, do = normal(case.batch, hkv, sk, dv), normal(case.batch, hq, sq, dv)
    q = q * LARGE if case.content == "large" else q
    bias = None
    if case.bias:
        sizes = zip("bhqk", (case.batch, hq, sq, sk), strict=True)
        bias = normal(*(size if letter in case.bias else 1 for letter, size in sizes))
        if case.masks:
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.35, -torch.inf)
    dlse = None
    if case.dlse:
        dlse = normal(case.batch, hq, sq) if case.dlse == "full" else normal(1)
    cu: list[Tensor | None] = [None, None]
    if case.lengths:
        lengths = torch.tensor([(0, 0), *case.lengths])
        cu = list(lengths.cumsum(0).int().t().contiguous())
    return Inputs(
        *(x.to(dtype) for x in (q, k, v, do)),
        dlse=None if dlse is None else dlse.expand(case.batch, hq, sq),
        sinks=normal(hq) if case.sinks else None,
        bias=None if bias is None else bias.to(DTYPES[case.bias_dtype or case.dtype]),
        slopes=torch.rand(case.batch, hq, generator=generator) if case.slopes else None,
        cu_q=cu[0],
        cu_k=cu[1],
    )


def _scale(case: Attention) -> float:
    return case.dims[0] ** -0.5 if case.scale is None else case.scale


def _reference(case: Attention, given: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """o, lse and all the gradients, in dtype."""
    wide = dtype == torch.float64
    q, k, v = (x.to(dtype).requires_grad_() for x in (given.q, given.k, given.v))
    do, bias, leaves = given.do.to(dtype), given.bias, [q, k, v]
    sinks, slopes = (
        x.double() if wide and x is not None else x for x in (given.sinks, given.slopes)
    )
    if bias is not None:
        bias = (bias.double() if wide else bias).requires_grad_()
        leaves.append(bias)
    o, lse = reference.attention(
        q, k, v, _scale(case), case.left, case.right, case.shift, case.softcap, sinks, bias,
        slopes, given.cu_q, given.cu_k, case.dropout, SEED,
    )  # fmt: skip
    dlse = torch.zeros_like(lse) if given.dlse is None else given.dlse.to(lse.dtype)
    gradients = torch.autograd.grad([o, lse], leaves, [do, dlse])
    names = ("dq", "dk", "dv", "dbias")
    return {"o": o.detach(), "lse": lse.detach()} | dict(zip(names, gradients, strict=False))


def _run(
    case: Attention, kernels: AttentionKernels, device: torch.device, given: Inputs
) -> tuple[dict[str, Tensor], str]:
    """What the kernels give, and what is wrong with where they wrote it."""
    sq, sk = case.sizes
    clean = (given.q, given.k, given.v, given.do)
    q, k, v, do = clean
    if case.content == "alien":
        q, k, v, do = (x.clone() for x in clean)
        queries, keys = case.lengths[0]
        for x, first in ((q, queries), (do, queries), (k, keys), (v, keys)):
            x[:, :, :first] = torch.nan
    _, inputs = _fresh(case, device, q, k, v)
    for view, x in zip(inputs, (q, k, v), strict=True):
        view.copy_(x)
    apart = replace(case, layout="bshd") if case.layout == "qkv" else case
    memories, (o, do_in) = _fresh(apart, device, do, do)
    do_in.copy_(do)
    rows = (case.batch, case.heads[0], sq)
    lse, delta = (Output((case.batch * case.heads[0] * sq,), torch.float32, device) for _ in "ab")
    sinks, slopes, cu_q, cu_k = (
        None if x is None else x.to(device)
        for x in (given.sinks, given.slopes, given.cu_q, given.cu_k)
    )
    bias = given.bias
    if bias is not None:
        sizes = (case.batch, case.heads[0], sq, sk)
        bias = bias.transpose(-1, -2).contiguous().transpose(-1, -2).to(device).expand(sizes)
    dropout = None
    if case.dropout:
        dropout = (SEED, threshold(case.dropout), 1 / (1 - case.dropout))
    rule = (_scale(case), case.left, case.right, case.shift, case.softcap, dropout)

    kernels.attention(
        *inputs, sinks, bias, slopes, cu_q, cu_k, rule, o, lse.tensor.view(rows)
    )  # fmt: skip
    dlse = None if given.dlse is None else given.dlse.to(device)
    kernels.attention_delta(o, do_in, dlse, delta.tensor.view(rows))
    saved = (*inputs, do_in, lse.tensor.view(rows), delta.tensor.view(rows))
    gradient_memories, gradients = _fresh(case, device, q, k, v)
    wanted = [x if name in case.grads else None for name, x in zip("qkv", gradients, strict=True)]
    kernels.attention_backward(*saved, bias, slopes, cu_q, cu_k, rule, *wanted)
    found = {"o": o, "lse": lse.tensor.view(rows)}
    found |= {f"d{n}": x for n, x in zip("qkv", wanted, strict=True) if x is not None}
    outputs = [*memories, *gradient_memories, lse, delta]
    if given.bias is not None:
        dbias = Output((given.bias.numel(),), given.bias.dtype, device)
        shaped = dbias.tensor.view(given.bias.shape)
        kernels.attention_bias_backward(*saved, bias, slopes, rule, shaped)
        found["dbias"] = shaped
        outputs.append(dbias)
    return {n: x.cpu() for n, x in found.items()}, "".join(m.outside("a result") for m in outputs)


def _fresh(
    case: Attention, device: torch.device, *like: Tensor
) -> tuple[list[Output], list[Tensor]]:
    """Memory full of NaN and views of it [B, H, S, D] in the case's layout."""
    dtype, memories, views = DTYPES[case.dtype], [], []
    side_by_side = case.layout == "qkv"
    all_heads = sum(x.shape[1] for x in like)
    offset = 0
    for x in like:
        b, h, s, d = x.shape
        if case.layout == "bhsd":
            stride = d + case.gap
            memory = Output((b * h * s, d), dtype, device, case.gap, case.misaligned)
            strides = (h * s * stride, s * stride, stride, 1)
        else:
            width = (all_heads if side_by_side else h) * d
            stride = width + case.gap
            if not (side_by_side and memories):
                memory = Output((b * s, width), dtype, device, case.gap, case.misaligned)
            strides = (s * stride, d, stride, 1)
        start = memory.tensor.storage_offset() + (offset if side_by_side else 0)
        views.append(memory.buffer.as_strided(x.shape, strides, start))
        offset += h * d
        memories.append(memory)
    return memories, views
