"""quantize and dequantize: memory-bound, so bytes over seconds beside a copy's is the measure.

dequantize   reads what is stored, writes N K elements
quantize     reads N K elements, writes what is stored
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import pyft
from pyft.bench import peers
from pyft.bench.backends import on_backends
from pyft.bench.problem import Call, Candidate, Case, Op, Problem, Request, Work, exact, near
from pyft.bench.problems.weights import Weight, weight
from pyft.bench.shapes import default_layers

BNB_FORMATS = ("nf4", "fp4")
SLACK = 1.1  # a peer's quantization error over the reference's


def moved(elements: int, itemsize: int, stored: int) -> Work:
    """Work of either direction for a weight of ``elements`` stored in ``stored`` bytes."""
    return Work(elements * itemsize + stored, 0, elements * itemsize)


def _cases(op: str, request: Request) -> list[Case]:
    return [
        Case(op, dtype, layer, {"N": layer.n, "K": layer.k}, format)
        for layer in request.layers or default_layers(request.machine)
        for dtype in request.dtypes or ("bf16",)
        for format in request.formats
    ]


def _dequantize(case: Case, request: Request) -> Iterator[Problem]:
    w = weight(case, request.device)
    work = moved(w.plain.numel(), w.plain.element_size(), w.stored_bytes)
    out = torch.empty_like(w.plain)

    def reused() -> Call:
        return Call(partial(pyft.dequantize, w.quantized, out=out), buffers=[out])

    def fresh() -> Call:
        return Call(partial(pyft.dequantize, w.quantized))

    def bitsandbytes(into: Tensor | None) -> Callable[[], Call]:
        def make() -> Call:
            if into is None or not into.is_cuda:  # its CPU kernel cannot write into a buffer
                return Call(w.bitsandbytes.dequantize)
            return Call(partial(w.bitsandbytes.dequantize, into), buffers=[into])

        return make

    def torchao() -> Call:
        return Call(w.torchao.get_original_weight)

    check = exact([w.decoded])
    for variant, make, into in (("reused buffer", reused, out), ("fresh buffer", fresh, None)):
        ours = on_backends(request, "quantize", make, check)
        others = _peers(case, w, bitsandbytes(into), torchao)
        yield Problem(case, variant, work, ours, others)


def _quantize(case: Case, request: Request) -> Iterator[Problem]:
    w = weight(case, request.device)
    work = moved(w.plain.numel(), w.plain.element_size(), w.stored_bytes)

    def make() -> Call:
        run = partial(pyft.quantize, w.plain, case.format)
        return Call(run, lambda: run().parts())

    def bitsandbytes() -> Call:
        return Call(
            partial(peers.Bnb4bit, w.plain, case.format),
            lambda: [peers.Bnb4bit(w.plain, case.format).dequantize()],
        )

    def torchao() -> Call:
        return Call(
            partial(peers.torchao_nf4, w.plain),
            lambda: [peers.torchao_nf4(w.plain).get_original_weight()],
        )

    ours = on_backends(request, "quantize", make, exact(w.quantized.parts()))
    yield Problem(case, "", work, ours, _peers(case, w, bitsandbytes, torchao))


def _peers(
    case: Case, w: Weight, bitsandbytes: Callable[[], Call], torchao: Callable[[], Call]
) -> list[Candidate]:
    """Those that know the format; their answer is compared with the weight before quantization."""
    check = near([w.plain], SLACK * w.quantization_error)
    known = (("bitsandbytes", bitsandbytes, BNB_FORMATS), ("torchao", torchao, ("nf4",)))
    return [
        Candidate(name, make, check, name)
        for name, make, formats in known
        if case.format in formats
    ]


DEQUANTIZE = Op(
    "dequantize",
    "decode a quantized weight",
    ("reused buffer", "fresh buffer"),
    "quantize",
    partial(_cases, "dequantize"),
    _dequantize,
)
QUANTIZE = Op(
    "quantize",
    "quantize a weight",
    ("",),
    "quantize",
    partial(_cases, "quantize"),
    _quantize,
)
