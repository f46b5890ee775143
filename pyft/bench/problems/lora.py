"""Groups of LoRA linears as a model has them.

    lora_qkv   q, k, v = q_proj(x), k_proj(x), v_proj(x)        x [M, K]   q [M, N]   k, v [M, Nkv]
    lora_mlp   y = down(silu(gate(x)) up(x))                    x, y [M, K]   gate and up [N, K]

Each linear with an adapter of rank R, over plain weights and quantized ones; forward, and backward
to x and all adapters. Least work: each tensor outside is read or written once, weights in the form
they are stored in, what lies between the linears not at all. The same linears frozen, without
adapters (dX only), are the floor; a vendor matmul of the first linear's shape is the ceiling.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

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
    near,
    relative_error,
    rows_checked,
)
from pyft.bench.problems.linear import SCALE, Makers
from pyft.bench.problems.quantize import BNB_FORMATS
from pyft.bench.problems.truths import part_of, truths
from pyft.bench.problems.weights import PLAIN, Weight, random, weights
from pyft.bench.shapes import Layer, Model, default_tokens, models_of

PEER_ERROR = 0.01  # of weights packed by bitsandbytes, beside ours: 0.0003 of NF4, 0.009 of FP4
Shapes = dict[str, tuple[int, int]]
Linear = Callable[[Tensor], Tensor]


def group_work(
    m: int, shapes: Mapping[str, tuple[int, int]], itemsize: int, stored: int, rank: int,
    outside: tuple[int, int],
) -> dict[str, Work]:  # fmt: skip
    """Work of each variant of linears (N, K), adapters on all; ``stored`` bytes of weights, read
    once forward and once backward; ``outside``: columns of the input and of all outputs.

    Forward: 2 M N K and 2 M R (K + N) of each. Backward: the same for dX, and as much again of the
    adapters' for dA and dB.
    """
    dense = sum(2 * m * n * k for n, k in shapes.values())
    low_rank = sum(2 * m * rank * (n + k) for n, k in shapes.values())
    adapters = sum(rank * (n + k) for n, k in shapes.values()) * itemsize
    x, y = (m * columns * itemsize for columns in outside)
    copied = max(n * k for n, k in shapes.values()) * itemsize
    forward = Work(stored + x + y + adapters, dense + low_rank, copied)
    backward = Work(stored + y + 2 * x + 2 * adapters, dense + 2 * low_rank, copied)
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops, copied)
    return dict(zip(VARIANTS, (forward, backward, both), strict=True))


def adapters_of(
    shapes: Mapping[str, tuple[int, int]], rank: int, case: Case, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, K] and B [N, R] of each linear, B not zero as it is when training starts."""
    return {
        name: (
            random((rank, k), case, device, f"{name} a") * k**-0.5,
            random((n, rank), case, device, f"{name} b") * rank**-0.5,
        )
        for name, (n, k) in shapes.items()
    }


def lora(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """A LoRA linear by plain torch in the dtype of x."""
    w, a, b = (part.to(x.dtype) for part in (w, a, b))
    return linear(x, w) + SCALE * linear(linear(x, a), b)


def packed_apart(references: Sequence[Tensor], wide: Sequence[Tensor]) -> Check:
    """For peers that pack the same weights themselves and round at other places than we do: twice
    the relative error of plain torch in the same dtype, where it is largest, and PEER_ERROR.
    """
    pairs = zip(references, wide, strict=True)
    rounding = max(relative_error(part[rows_checked(len(part))], truth) for part, truth in pairs)
    return near(wide, PEER_ERROR + 2 * rounding)


def _shapes(case: Case) -> Shapes:
    n, k = case.sizes["N"], case.sizes["K"]
    if case.op == "lora_mlp":
        return {"gate": (n, k), "up": (n, k), "down": (k, n)}
    keys = case.sizes["Nkv"]
    return {"q": (n, k), "k": (keys, k), "v": (keys, k)}


def _cases(op: str, request: Request) -> list[Case]:
    return [
        Case(op, dtype, _layer(op, model), {"M": m, **_sizes(op, model), "R": request.rank}, format)
        for model in models_of(request.layers, request.machine)
        for dtype in request.dtypes or ("bf16",)
        for format in (*request.formats, PLAIN)
        for m in request.tokens or default_tokens(request.machine)
    ]


def _sizes(op: str, model: Model) -> dict[str, int]:
    if op == "lora_mlp":
        return {"N": model.intermediate, "K": model.hidden}
    return {"N": model.queries, "K": model.hidden, "Nkv": model.keys}


def _layer(op: str, model: Model) -> Layer:
    first = "gate" if op == "lora_mlp" else "q"
    source = f"{model.name} {first}" if model.name else ""
    return Layer(*model.linears()[first], source, model.name)


def _composed(op: str, linears: Sequence[Linear], x: Tensor) -> Any:
    """The linears as transformers' models call them."""
    if op == "lora_qkv":
        return tuple(each(x) for each in linears)
    gate, up, down = linears
    return down(silu(gate(x)) * up(x))


def _pyft(op: str, ws: Sequence[Weight], x: Tensor, *adapters: Tensor) -> Any:
    function: Callable[..., Any] = pyft.lora_mlp if op == "lora_mlp" else pyft.lora_qkv
    pairs = zip(adapters[::2], adapters[1::2], strict=True)
    return function(x, *((w.used, None, a, b, SCALE) for w, (a, b) in zip(ws, pairs, strict=True)))


def _plain(op: str, ws: Sequence[Weight], x: Tensor, *adapters: Tensor) -> Any:
    """By plain torch in the dtype of x; without adapters the frozen linears."""
    weights = [w.decoded.to(x.dtype) for w in ws]
    if not adapters:
        return _composed(op, [partial(_linear, w) for w in weights], x)
    triples = zip(weights, adapters[::2], adapters[1::2], strict=True)
    return _composed(op, [partial(lora, *triple) for triple in triples], x)


def _linear(w: Tensor, x: Tensor) -> Tensor:
    return linear(x, w)


def _problems(op: str, case: Case, request: Request) -> Iterator[Problem]:
    shapes, device, m = _shapes(case), request.device, case.sizes["M"]
    named = weights(shapes, case, device)
    ws = list(named.values())
    pairs = adapters_of(shapes, case.sizes["R"], case, device)
    x = random((m, case.sizes["K"]), case, device, "x")
    outputs = {"down": shapes["down"]} if op == "lora_mlp" else shapes
    dys = [random((m, n), case, device, f"d{name}") for name, (n, _) in outputs.items()]
    dy: Any = dys[0] if len(dys) == 1 else dys
    inputs = [x, *(part for pair in pairs.values() for part in pair)]
    references, wide = truths(partial(_plain, op, ws), inputs, dys)
    floor_references, floor_wide = truths(partial(_plain, op, ws), [x], dys, by_rows=True)
    for leaf in inputs:
        leaf.requires_grad_()
    makers = gradients(partial(_pyft, op, ws), inputs, dy)
    frozen = gradients(partial(_plain, op, ws), [x], dy)

    @cache
    def peft() -> Makers:
        model = torch.nn.ModuleDict({name: w.linear for name, w in named.items()})
        adapters = peers.add_peft_lora(model, pairs, SCALE)
        linears = list(model.values())
        return gradients(lambda x, *adapters: _composed(op, linears, x), [x, *adapters], dy)

    works = group_work(
        m, shapes, x.element_size(), sum(w.stored_bytes for w in ws), case.sizes["R"],
        (case.sizes["K"], sum(part.shape[1] for part in dys)),
    )  # fmt: skip
    n, k = next(iter(shapes.values()))
    for variant, work in works.items():
        part = part_of(variant, len(dys))
        check = close(references[part], wide[part])
        floor_check = close(floor_references[part], floor_wide[part])
        others = [Candidate("torch frozen linears", frozen[variant], floor_check, "torch")]
        if case.format in (PLAIN, *BNB_FORMATS):
            apart = packed_apart(references[part], wide[part])
            plain = case.format == PLAIN
            name, theirs = ("peft", check) if plain else ("peft+bitsandbytes", apart)
            others.append(Candidate(name, partial(_later, peft, variant), theirs, "peft"))
        yield Problem(
            case,
            variant,
            work,
            on_backends(request, op, makers[variant], check),
            others,
            matmul=lambda: torch.mm(x.detach(), ws[0].decoded.t()),
            matmul_flops=2 * m * n * k,
        )


def _later(peft: Callable[[], Makers], variant: str) -> Call:
    return peft()[variant]()


LORA_QKV = Op(
    "lora_qkv",
    "queries, keys and values with LoRA adapters, with all gradients",
    VARIANTS,
    "lora_qkv",
    partial(_cases, "lora_qkv"),
    partial(_problems, "lora_qkv"),
)
LORA_MLP = Op(
    "lora_mlp",
    "gated MLP with LoRA adapters, with all gradients",
    VARIANTS,
    "lora_mlp",
    partial(_cases, "lora_mlp"),
    partial(_problems, "lora_mlp"),
)
