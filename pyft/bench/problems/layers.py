"""Norms, rotary embeddings and gated activations: what a layer does between its matmuls.

    rms_norm, layer_norm    y, dX and dweight of x [M, D]
    rope                    q [1, H, M, 128] and k with a quarter of the heads, H = K / 128
    swiglu, geglu           gate and up [M, N]

All are bound by memory: the least work is each tensor read or written once, the ceiling a copy.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pyft
from pyft.bench.backends import gradients, on_backends
from pyft.bench.problem import (
    Candidate,
    Case,
    Op,
    Problem,
    Request,
    Work,
    close,
    rows_checked,
)
from pyft.bench.problems.weights import random
from pyft.bench.shapes import default_layers, default_tokens

EPS = 1e-6
HEAD_DIM = 128
QUERY_GROUP = 4  # query heads of one key head
VARIANTS = ("forward", "backward", "forward+backward")
Function = Callable[..., Any]


def bytes_moved(op: str, m: int, width: int, itemsize: int) -> dict[str, int]:
    """Of activations, each variant: the least there is."""
    row = m * width * itemsize
    if "norm" in op:  # x, y; dy, x, dx
        forward, backward = 2 * row, 3 * row
    elif op == "rope":  # q and k in and out, cos and sin
        heads = row + row // QUERY_GROUP
        forward = backward = 2 * heads + m * HEAD_DIM * itemsize
    else:  # gate, up, y; dy, gate, up, dgate, dup
        forward, backward = 3 * row, 5 * row
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def _cases(op: str, request: Request) -> list[Case]:
    layers = request.layers or default_layers(request.machine)[-1:]
    wide = op in ("swiglu", "geglu")
    widths = {layer.n if wide else layer.k: layer for layer in layers}
    return [
        Case(op, dtype, layer, {"M": m, "D": width})
        for width, layer in widths.items()
        for m in request.tokens or default_tokens(request.machine)[-1:]
        for dtype in request.dtypes or ("bf16",)
    ]


def _problems(
    op: str, ours: Function, plain: Function, peers: dict[str, Function], case: Case,
    request: Request,
) -> Iterator[Problem]:  # fmt: skip
    m, width = (case.sizes[name] for name in "MD")
    inputs, dys = _inputs(op, case, request)
    makers = gradients(ours, inputs, dys)
    references, truths = _truths(plain, inputs, dys)
    moved = bytes_moved(op, m, width, inputs[0].element_size())
    outputs = len(dys)
    for variant in VARIANTS:
        wanted = {"forward": slice(outputs), "backward": slice(outputs, None)}
        part = wanted.get(variant, slice(None))
        check = close(references[part], truths[part])
        theirs = [
            Candidate(name, gradients(function, inputs, dys)[variant], check, name.split(" ")[0])
            for name, function in peers.items()
        ]
        work = Work(moved[variant], 0, m * width * inputs[0].element_size())
        backend_op = {"rms_norm": "norm", "layer_norm": "norm", "rope": "rope"}.get(op, "glu")
        yield Problem(
            case, variant, work, on_backends(request, backend_op, makers[variant], check), theirs
        )


def _inputs(op: str, case: Case, request: Request) -> tuple[list[Tensor], list[Tensor]]:
    m, width = (case.sizes[name] for name in "MD")

    def make(shape: tuple[int, ...], what: str) -> Tensor:
        return random(shape, case, request.device, what)

    if "norm" in op:
        weight = 1 + 0.1 * make((width,), "weight")
        return [make((m, width), "x").requires_grad_(), weight.requires_grad_()], [
            make((m, width), "dy")
        ]
    if op == "rope":
        heads = width // HEAD_DIM
        shapes = [(1, m, h, HEAD_DIM) for h in (heads, max(1, heads // QUERY_GROUP))]
        q, k = (make(shape, f"x{i}").transpose(1, 2) for i, shape in enumerate(shapes))
        dys = [make(shape, f"dy{i}").transpose(1, 2) for i, shape in enumerate(shapes)]
        return [q.requires_grad_(), k.requires_grad_()], dys
    gate, up = (make((m, width), what).requires_grad_() for what in ("gate", "up"))
    return [gate, up], [make((m, width), "dy")]


def _truths(
    plain: Function, inputs: Sequence[Tensor], dys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """All of the outputs and gradients by plain torch, and their checked rows in float64."""

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in inputs]
        found = plain(*leaves)
        ys = (found,) if isinstance(found, Tensor) else found
        grads = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
        return [*(y.detach() for y in ys), *grads]

    references = run(inputs[0].dtype)
    wide = run(torch.float64)
    rows = (rows_checked(len(part)).to(part.device) for part in wide)
    return references, [part[at] for part, at in zip(wide, rows, strict=True)]


def _tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, M, 64] of positions 0, 1, .. in x's dtype."""
    half = HEAD_DIM // 2
    frequency = 1e4 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * frequency
    return angle.cos()[None].bfloat16().to(x.dtype), angle.sin()[None].bfloat16().to(x.dtype)


def _rope(q: Tensor, k: Tensor) -> Any:
    return pyft.rope(q, k, *_tables(q))


def _rope_of_transformers(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' models write it: halves turned by whole rows of cos and sin."""
    cos, sin = (torch.cat((table, table), -1)[:, None] for table in _tables(q))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def _norm_of_transformers(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' models write it: in fp32, rounded before the weight."""
    wide = x.float() if x.dtype != torch.float64 else x
    root = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * root.to(x.dtype)


def _op(name: str, summary: str, ours: Function, plain: Function, peers: dict[str, Function]) -> Op:
    backend_op = {"rms_norm": "norm", "layer_norm": "norm", "rope": "rope"}.get(name, "glu")
    cases, problems = partial(_cases, name), partial(_problems, name, ours, plain, peers)
    return Op(name, summary, VARIANTS, backend_op, cases, problems)


def _torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _torch_layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, None, EPS)


def _torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _torch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


RMS_NORM = _op(
    "rms_norm",
    "RMSNorm with the gradients of input and weight",
    lambda x, weight: pyft.rms_norm(x, weight, EPS),
    _torch_rms,
    {"torch rms_norm": _torch_rms, "torch as transformers": _norm_of_transformers},
)
LAYER_NORM = _op(
    "layer_norm",
    "LayerNorm with the gradients of input and weight",
    lambda x, weight: pyft.layer_norm(x, weight, None, EPS),
    _torch_layer,
    {"torch layer_norm": _torch_layer},
)
ROPE = _op(
    "rope",
    "rotary embedding of queries and keys",
    _rope,
    _rope_of_transformers,
    {"torch as transformers": _rope_of_transformers},
)
SWIGLU = _op("swiglu", "silu(gate) up", pyft.swiglu, _torch_swiglu, {"torch": _torch_swiglu})
GEGLU = _op(
    "geglu",
    "gelu(gate) up, by tanh",
    partial(pyft.geglu, approximate="tanh"),
    _torch_geglu,
    {"torch": _torch_geglu},
)
