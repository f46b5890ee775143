"""Dropout: reads a tensor and writes one, forward and backward alike; no mask is stored.

torch's own keeps a mask of one byte an element from forward to backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import pyft
from pyft.bench.backends import gradients, on_backends
from pyft.bench.problem import (
    Candidate,
    Case,
    Check,
    Op,
    Problem,
    Request,
    Verdict,
    Work,
    exact,
)
from pyft.bench.problems.weights import random
from pyft.bench.shapes import default_layers, default_tokens

P = 0.1
SEED = 20


def dropout_work(elements: int, itemsize: int) -> Work:
    """Work of either direction."""
    return Work(2 * elements * itemsize, 0, elements * itemsize)


def _cases(request: Request) -> list[Case]:
    layers = {layer.k: layer for layer in request.layers or default_layers(request.machine)}
    tokens = request.tokens or default_tokens(request.machine)[-1:]
    return [
        Case("dropout", dtype, layer, {"M": m, "K": k})
        for k, layer in layers.items()
        for m in tokens
        for dtype in request.dtypes or ("bf16", "fp32")
    ]


def _problems(case: Case, request: Request) -> Iterator[Problem]:
    shape = (case.sizes["M"], case.sizes["K"])
    x = random(shape, case, request.device, "x").requires_grad_()
    dy = random(shape, case, request.device, "dy")
    with pyft.backend("reference"):
        expected = [pyft.dropout(tensor, P, seed=SEED) for tensor in (x.detach(), dy)]
    makers = gradients(lambda x: pyft.dropout(x, P, seed=SEED), [x], dy)
    theirs = gradients(lambda x: torch.nn.functional.dropout(x, P), [x], dy)
    work = dropout_work(x.numel(), x.element_size())
    for variant, truth, source in (("forward", expected[0], x), ("backward", expected[1], dy)):
        ours = on_backends(request, "dropout", makers[variant], exact([truth]))
        peer = Candidate("torch", theirs[variant], _some_mask(source.detach()), "torch")
        yield Problem(case, variant, work, ours, [peer])


def _some_mask(source: Tensor) -> Check:
    """What is kept is the source over 1 - P, and about 1 - P of it is kept."""

    def check(found: Sequence[Tensor]) -> Verdict:
        kept = found[0] != 0
        expected = torch.where(kept, source.float() / (1 - P), 0.0)
        off = (found[0].float() - expected).abs() > 0.01 * expected.abs()
        allowed = 5 * (P * (1 - P) / source.numel()) ** 0.5
        return Verdict(float(off.any()) + abs(1 - P - float(kept.float().mean())), allowed)

    return check


DROPOUT = Op(
    "dropout", "dropout from a seed", ("forward", "backward"), "dropout", _cases, _problems
)
