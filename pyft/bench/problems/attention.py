"""Attention, forward and backward, beside what torch has.

    causal, full    q [B, H, M, D], k and v [B, Hkv, M, D]
    packed          eight causal sequences in one row; peers that have no packing get a mask
    chunked         causal, keys and values a quarter at a time

A backward counts as 2.5 forwards, a causal mask as half the work, eight sequences as an eighth of
that: what has to be computed, whether or not a kernel computes more.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pyft
from pyft.bench.backends import VARIANTS, gradients, on_backends
from pyft.bench.problem import Candidate, Case, Check, Op, Problem, Request, Work, close, near
from pyft.bench.problems.truths import part_of
from pyft.bench.problems.weights import random
from pyft.bench.shapes import Layer

KINDS = {"attention": ("causal", "full", "packed"), "chunked_attention": ("causal",)}
CHUNKS = 4
SEQUENCES = 8  # of a packed row
# (H, Hkv, D), and how many tokens a batch has: in all as many as fill a GPU
HEADS = {
    "cpu": ((8, 8, 128), (8, 2, 128)),
    "gpu8": ((32, 8, 64), (16, 16, 128)),
    "gpu24": ((32, 32, 64), (16, 16, 128), (32, 8, 128)),
}
TOKENS = {"cpu": (2048,), "gpu8": (1024, 4096), "gpu24": (1024, 4096, 16384, 32768)}
FILLED = {"cpu": 2048, "gpu8": 4096, "gpu24": 32768}
TRUTH_SCORES = 2**27  # in memory at once, some rows of each head
# ||peer - truth|| / ||truth|| that is rounding
NEAR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MATMUL = 2048  # the vendor's matmul beside it: square


def _cases(op: str, request: Request) -> list[Case]:
    """``--shapes`` name linears, of which attention has none."""
    machine = request.machine
    return [
        Case(
            op,
            dtype,
            Layer(h * d, hkv * d),
            {"M": m, "B": _rows(kind, machine, m), "H": h, "Hkv": hkv, "D": d},
            kind,
        )
        for h, hkv, d in HEADS[machine]
        for m in request.tokens or TOKENS[machine]
        for dtype in request.dtypes or ("bf16",)
        for kind in KINDS[op]
    ]


def _rows(kind: str, machine: str, m: int) -> int:
    return 1 if kind == "packed" else max(1, FILLED[machine] // max(m, 1024))


def attention_work(case: Case, itemsize: int) -> dict[str, Work]:
    """Work of each variant: q, k, v, o and their gradients each once."""
    b, h, hkv, m, d = (case.sizes[name] for name in ("B", "H", "Hkv", "M", "D"))
    share = {"full": 1.0, "causal": 0.5, "packed": 0.5 / SEQUENCES}[case.format]
    flops = int(4 * b * h * m * m * d * share)
    queries, keys = b * h * m * d * itemsize, b * hkv * m * d * itemsize
    parts = [
        (2 * queries + 2 * keys, flops),
        (4 * queries + 4 * keys, flops * 5 // 2),
    ]
    parts.append((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]))
    return {
        name: Work(moved, done, queries)
        for name, (moved, done) in zip(VARIANTS, parts, strict=True)
    }


def _inputs(case: Case, request: Request) -> tuple[list[Tensor], Tensor]:
    """q, k, v and dO, each in memory [B, M, H, D]."""
    b, m, d = (case.sizes[name] for name in ("B", "M", "D"))
    heads = {"q": "H", "k": "Hkv", "v": "Hkv", "do": "H"}
    q, k, v, do = (
        random((b, m, case.sizes[size], d), case, request.device, name).transpose(1, 2)
        for name, size in heads.items()
    )
    return [q, k, v], do


def plain(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, kind: str, dtype: torch.dtype
) -> list[Tensor]:
    """o, dq, dk and dv computed in ``dtype``, softmax in fp32 or better, some rows at a time."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    q, do = q.to(dtype), do.to(dtype)
    keys, values = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v))
    m, scale = q.shape[2], q.shape[3] ** -0.5
    o, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (keys, values))
    step = max(1, TRUTH_SCORES // (q.shape[0] * q.shape[1] * m))
    for start in range(0, m, step):
        rows = slice(start, min(m, start + step))
        scores = (q[:, :, rows] @ keys.transpose(2, 3)).to(wide) * scale
        seen = _seen(kind, m, q.device)
        if seen is not None:
            scores.masked_fill_(~seen[rows], -torch.inf)
        p = scores.softmax(-1)
        o[:, :, rows] = p.to(dtype) @ values
        dv += (p.to(dtype).transpose(2, 3) @ do[:, :, rows]).to(wide)
        dp = (do[:, :, rows] @ values.transpose(2, 3)).to(wide)
        delta = (o[:, :, rows].to(wide) * do[:, :, rows].to(wide)).sum(-1, keepdim=True)
        ds = (p * (dp - delta) * scale).to(dtype)
        dq[:, :, rows] = ds @ keys
        dk += (ds.transpose(2, 3) @ q[:, :, rows]).to(wide)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2).to(dtype) for x in (dk, dv))
    return [o, dq, dk, dv]


def _seen(kind: str, m: int, device: torch.device) -> Tensor | None:
    """Which keys (columns) each query (row) sees; None: all."""
    if kind == "full":
        return None
    place = torch.arange(m, device=device)
    seen = place[:, None] >= place
    if kind == "packed":
        sequence = torch.bucketize(place, _boundaries(m, device).long(), right=True)
        seen &= sequence[:, None] == sequence
    return seen


def _boundaries(m: int, device: torch.device) -> Tensor:
    edges = [m * i // SEQUENCES for i in range(SEQUENCES + 1)]
    return torch.tensor(edges, dtype=torch.int32, device=device)


def _ours(op: str, kind: str, device: torch.device, q: Tensor, k: Tensor, v: Tensor) -> Any:
    if op == "chunked_attention":
        return pyft.chunked_attention(q, k, v, -(-k.shape[2] // CHUNKS))
    cu = _boundaries(q.shape[2], device) if kind == "packed" else None
    return pyft.attention(q, k, v, causal=kind != "full", cu_seqlens_q=cu)


def _problems(case: Case, request: Request) -> Iterator[Problem]:
    inputs, do = _inputs(case, request)
    kind, device = case.format, request.device
    dtype = inputs[0].dtype
    q, k, v = inputs
    references, truths = (plain(q, k, v, do, kind, t) for t in (dtype, torch.float64))
    for leaf in inputs:
        leaf.requires_grad_()
    ours = gradients(partial(_ours, case.op, kind, device), inputs, do)
    functions = _torch_has(kind, case.sizes["M"], device)
    square = torch.randn(MATMUL, MATMUL, device=device).to(dtype)
    for variant, work in attention_work(case, inputs[0].element_size()).items():
        part = part_of(variant, 1)
        check = close(references[part], truths[part])
        peers = _peers(functions, inputs, do, variant, near(truths[part], NEAR[dtype]))
        candidates = on_backends(request, case.op, ours[variant], check)
        yield Problem(
            case, variant, work, candidates, peers, lambda: square @ square, 2 * MATMUL**3
        )


def _peers(
    functions: dict[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    do: Tensor,
    variant: str,
    check: Check,
) -> list[Candidate]:
    return [
        Candidate(name, gradients(function, inputs, do)[variant], check, "torch")
        for name, function in functions.items()
    ]


def _torch_has(kind: str, m: int, device: torch.device) -> dict[str, Callable[..., Any]]:
    """torch's own: SDPA as it chooses, on a GPU each of its kernels, and FlexAttention compiled."""
    seen = _seen(kind, m, device) if kind == "packed" else None

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=kind == "causal", enable_gqa=q.shape[1] != k.shape[1]
        )

    if device.type != "cuda":
        return {"torch sdpa": sdpa}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend: SDPBackend) -> Callable[..., Tensor]:
        def on_it(*heads: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*heads)

        return on_it

    kernels = {
        "torch sdpa flash": SDPBackend.FLASH_ATTENTION,
        "torch sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found = {name: only(backend) for name, backend in kernels.items()}
    return {"torch sdpa": sdpa, **found, "torch flex": _flex(kind, m, device)}


def _flex(kind: str, m: int, device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if kind != "full":
        edges = _boundaries(m, device).long() if kind == "packed" else None
        places = torch.arange(m, device=device)
        sequence = None if edges is None else torch.bucketize(places, edges, right=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i >= j if sequence is None else (i >= j) & (sequence[i] == sequence[j])

        mask = create_block_mask(visible, None, None, m, m, device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return flex


def _op(name: str, summary: str) -> Op:
    return Op(name, summary, VARIANTS, name, partial(_cases, name), _problems)


ATTENTION = _op("attention", "attention of grouped heads, causal, full and packed")
CHUNKED_ATTENTION = _op("chunked_attention", "attention, keys and values a chunk at a time")
