"""Norms, rotary embeddings and gated activations: what a layer does between its matmuls.

    rms_norm, layer_norm    y, dX and dweight of x [M, D]
    rope                    q [1, H, M, 128] and k [1, Hkv, M, 128], H = K / 128, Hkv = H / 4
    swiglu, geglu           gate and up [M, D]

All are bound by memory: the least work is each tensor read or written once, the ceiling a copy.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pyft
from pyft.bench import peers
from pyft.bench.backends import VARIANTS, gradients, on_backends
from pyft.bench.problem import (
    Call,
    Candidate,
    Case,
    Check,
    Op,
    Problem,
    Request,
    Work,
    close,
)
from pyft.bench.problems.truths import part_of, truths
from pyft.bench.problems.weights import random
from pyft.bench.shapes import default_layers, default_tokens

EPS = 1e-6
HEAD_DIM = 128
QUERY_GROUP = 4  # query heads of one key head
ROPE_BASE = 1e4
BACKEND_OPS = {
    "rms_norm": "norm",
    "layer_norm": "norm",
    "rope": "rope",
    "swiglu": "glu",
    "geglu": "glu",
}
Function = Callable[..., Any]
Inputs = tuple[list[Tensor], list[Tensor]]  # and the gradients of the outputs


def layer_work(op: str, sizes: dict[str, int], itemsize: int) -> dict[str, Work]:
    """Work of each variant: activations, and the tables of rope."""
    m = sizes["M"]
    if op == "rope":  # q and k in and out, cos and sin
        row = sizes["H"] * HEAD_DIM
        forward = backward = 2 * m * (row + sizes["Hkv"] * HEAD_DIM) + m * HEAD_DIM
    elif BACKEND_OPS[op] == "norm":  # x, y; dy, x, dx
        row = sizes["D"]
        forward, backward = 2 * m * row, 3 * m * row
    else:  # gate, up, y; dy, gate, up, dgate, dup
        row = sizes["D"]
        forward, backward = 3 * m * row, 5 * m * row
    elements = dict(zip(VARIANTS, (forward, backward, forward + backward), strict=True))
    return {name: Work(count * itemsize, 0, m * row * itemsize) for name, count in elements.items()}


def _cases(op: str, request: Request) -> list[Case]:
    layers = request.layers or default_layers(request.machine)[-1:]
    gated = BACKEND_OPS[op] == "glu"
    widths = {layer.n if gated else layer.k: layer for layer in layers}
    return [
        Case(op, dtype, layer, {"M": m, **_width(op, width)})
        for width, layer in widths.items()
        for m in request.tokens or default_tokens(request.machine)[-1:]
        for dtype in request.dtypes or ("bf16",)
    ]


def _width(op: str, width: int) -> dict[str, int]:
    if op != "rope":
        return {"D": width}
    heads = max(1, width // HEAD_DIM)
    return {"H": heads, "Hkv": max(1, heads // QUERY_GROUP), "D": HEAD_DIM}


def _norm_inputs(case: Case, request: Request) -> Inputs:
    shape = (case.sizes["M"], case.sizes["D"])
    x, dy = (_random(case, request, shape, name) for name in ("x", "dy"))
    return [x, 1 + 0.1 * _random(case, request, shape[1:], "weight")], [dy]


def _rope_inputs(case: Case, request: Request) -> Inputs:
    shapes = [(1, case.sizes["M"], case.sizes[heads], HEAD_DIM) for heads in ("H", "Hkv")]
    q, k, dq, dk = (
        _random(case, request, shape, name).transpose(1, 2)
        for names in (("q", "k"), ("dq", "dk"))
        for shape, name in zip(shapes, names, strict=True)
    )
    return [q, k], [dq, dk]


def _glu_inputs(case: Case, request: Request) -> Inputs:
    shape = (case.sizes["M"], case.sizes["D"])
    gate, up, dy = (_random(case, request, shape, name) for name in ("gate", "up", "dy"))
    return [gate, up], [dy]


def _random(case: Case, request: Request, shape: tuple[int, ...], name: str) -> Tensor:
    return random(shape, case, request.device, name)


INPUTS = {"norm": _norm_inputs, "rope": _rope_inputs, "glu": _glu_inputs}


def _problems(
    op: str,
    ours: Function,
    plain: Function,
    others: dict[str, Function],
    case: Case,
    request: Request,
) -> Iterator[Problem]:
    """``plain`` is the reference, and ``others`` what torch has."""
    backend_op = BACKEND_OPS[op]
    inputs, dys = INPUTS[backend_op](case, request)
    references, wide = truths(plain, inputs, dys, by_rows=backend_op == "glu")
    for leaf in inputs:
        leaf.requires_grad_()
    makers = gradients(ours, inputs, dys)
    works = layer_work(op, dict(case.sizes), inputs[0].element_size())
    for variant, work in works.items():
        part = part_of(variant, len(dys))
        check = close(references[part], wide[part])
        theirs = [
            Candidate(name, gradients(function, inputs, dys)[variant], check, "torch")
            for name, function in others.items()
        ]
        if request.device.type == "cuda" and op in LIGER and peers.installed("liger_kernel"):
            theirs.append(_liger(op, variant, (inputs, dys), check))
        candidates = on_backends(request, backend_op, makers[variant], check)
        yield Problem(case, variant, work, candidates, theirs)


def _liger(op: str, variant: str, given: Inputs, check: Check) -> Candidate:
    """Over tensors of its own: it writes gradients and turned heads over what it was given."""

    def make() -> Call:
        function = partial(LIGER[op], peers.load("liger_kernel.transformers.functional"))
        leaves, dys = ([t.detach().clone() for t in tensors] for tensors in given)
        return gradients(function, [leaf.requires_grad_() for leaf in leaves], dys)[variant]()

    return Candidate("liger-kernel", make, check, "liger-kernel")


LIGER: dict[str, Function] = {
    "rms_norm": lambda liger, x, weight: liger.liger_rms_norm(x, weight, EPS),
    "rope": lambda liger, q, k: liger.liger_rope(q, k, *_whole_tables(q))[:2],
    "swiglu": lambda liger, gate, up: liger.liger_swiglu(gate, up),
    "geglu": lambda liger, gate, up: liger.liger_geglu(gate, up),
}


@lru_cache(maxsize=2)
def _tables_of(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    half = HEAD_DIM // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(m, device=device, dtype=torch.float32)[:, None] * frequency
    cos, sin = (table[None].bfloat16().to(dtype) for table in (angle.cos(), angle.sin()))
    return cos, sin


@lru_cache(maxsize=2)
def _whole_tables_of(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((table, table), -1) for table in _tables_of(m, dtype, device))
    return cos, sin


def _tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, M, 64] of positions 0, 1, .. in x's dtype, the same values in each; made
    once, as a model makes them once for all its layers.
    """
    return _tables_of(x.shape[2], x.dtype, x.device)


def _whole_tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """[1, M, 128], each half the table: what transformers' models hand around."""
    return _whole_tables_of(x.shape[2], x.dtype, x.device)


def _rope(q: Tensor, k: Tensor) -> Any:
    return pyft.rope(q, k, *_tables(q))


def _rope_of_transformers(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' models write it: halves turned by whole rows of cos and sin."""
    cos, sin = (table[:, None] for table in _whole_tables(q))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def _norm_of_transformers(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' models write it: in fp32, rounded before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def _torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _torch_layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, None, EPS)


def _torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _torch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _op(
    name: str, summary: str, ours: Function, plain: Function, others: dict[str, Function]
) -> Op:
    problems = partial(_problems, name, ours, plain, others)
    return Op(name, summary, VARIANTS, BACKEND_OPS[name], partial(_cases, name), problems)


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
SWIGLU = _op(
    "swiglu",
    "silu(gate) up",
    lambda gate, up: pyft.swiglu(gate, up),
    _torch_swiglu,
    {"torch": _torch_swiglu},
)
GEGLU = _op(
    "geglu",
    "gelu(gate) up, by tanh",
    lambda gate, up: pyft.geglu(gate, up, "tanh"),
    _torch_geglu,
    {"torch": _torch_geglu},
)
