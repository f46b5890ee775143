"""One optimizer step with states in 8 bits.

Least work for an element of an 8-bit AdamW step: the parameter read and written, the gradient read,
two states of a byte read and written, and for each state an fp32 absmax a block of 256 read and
written: 3 itemsize + 4 + 16/256 bytes.

Measured on one tensor of a layer's size, and on the LoRA adapters of a whole model, which are
hundreds of small tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import pyft
from pyft.bench import peers
from pyft.bench.backends import on_backends
from pyft.bench.problem import Call, Candidate, Case, Op, Problem, Request, Work, exact, near
from pyft.bench.problems.weights import random
from pyft.bench.shapes import MODELS, Layer, parse_layers

BLOCK = 256
STEPS_CHECKED = 3
UPDATE_ERROR = 0.1  # of the update after those steps, for 8-bit states and parameters in 16 bits
PER_SHAPE = "its step is compiled for each shape of tensor, which takes minutes for adapters"
SPREAD = 0.02  # of the parameters
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
Make = Callable[..., torch.optim.Optimizer]  # of parameters and HYPER


def adamw8bit_work(sizes: Sequence[int], itemsize: int) -> Work:
    """Work of a step over tensors of these sizes."""
    elements, blocks = sum(sizes), sum(-(-size // BLOCK) for size in sizes)
    return Work(elements * (3 * itemsize + 4) + 16 * blocks, 0, elements * itemsize)


def adapter_shapes(model: str, rank: int) -> list[tuple[int, int]]:
    """A [R, K] and B [N, R] of each linear of each layer of a model."""
    known = MODELS[model]
    one = [shape for n, k in known.linears().values() for shape in ((rank, k), (n, rank))]
    return one * known.layers


def _cases(request: Request) -> list[Case]:
    adapters = "Llama-3.2-1B" if request.device.type == "cpu" else "Llama-3.1-8B"
    layers, models = parse_layers("8b:q"), [adapters]
    if request.layers:
        layers = list(request.layers)
        models = list(dict.fromkeys(layer.model for layer in layers if layer.model))
    found = []
    for dtype in request.dtypes or ("fp32", "bf16"):
        found += [Case("adamw8bit", dtype, layer, {"N": layer.n, "K": layer.k}) for layer in layers]
        found += [_adapters(model, dtype, request.rank) for model in models]
    return found


def _adapters(model: str, dtype: str, rank: int) -> Case:
    shapes = adapter_shapes(model, rank)
    sizes = {"tensors": len(shapes), "elements": sum(n * k for n, k in shapes), "R": rank}
    return Case("adamw8bit", dtype, Layer(*shapes[0], f"{model} adapters", model), sizes)


def _problems(case: Case, request: Request) -> Iterator[Problem]:
    if "tensors" in case.sizes:
        shapes = adapter_shapes(case.layer.model, case.sizes["R"])
    else:
        shapes = [(case.sizes["N"], case.sizes["K"])]
    start = _like(shapes, case, request, "parameters", SPREAD)
    gradients = [_like(shapes, case, request, f"step {i}", 1.0) for i in range(STEPS_CHECKED)]
    work = adamw8bit_work([tensor.numel() for tensor in start], start[0].element_size())

    def call(make: Make, subtract: bool) -> Call:
        parameters, optimizer = _optimizer(make, start, gradients[0])

        def outputs() -> list[Tensor]:
            found = _steps(make, start, gradients)
            pairs = zip(found, start, strict=True)
            return [(a.float() - b.float()) if subtract else a for a, b in pairs]

        def step() -> list[torch.nn.Parameter]:
            optimizer.step()
            return parameters  # kept alive with the optimizer

        return Call(step, outputs)

    with pyft.backend("reference"):
        expected = _steps(_ours, start, gradients)
    truth = _steps(torch.optim.AdamW, *_wide(start, gradients))
    moved = [(a - b.double()).float() for a, b in zip(truth, start, strict=True)]
    theirs = near(moved, UPDATE_ERROR)
    slow = PER_SHAPE if len(set(shapes)) > 1 else ""
    rivals = {"torch fused": _torch, "bitsandbytes": _bitsandbytes, "torchao": _torchao}
    yield Problem(
        case,
        "",
        work,
        on_backends(request, "optim", lambda: call(_ours, subtract=False), exact(expected)),
        [
            Candidate(
                name, _later(call, make), theirs, name.split()[0], slow if name == "torchao" else ""
            )
            for name, make in rivals.items()
        ],
    )


def _later(call: Callable[[Make, bool], Call], make: Make) -> Callable[[], Call]:
    return lambda: call(make, True)


def _ours(parameters: list[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    from pyft.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **hyper)
    return optimizer


def _torch(parameters: list[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **hyper)


def _bitsandbytes(parameters: list[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = peers.load("bitsandbytes.optim").AdamW8bit(
        parameters, **hyper
    )
    return optimizer


def _torchao(parameters: list[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = peers.load("torchao.optim").AdamW8bit(parameters, **hyper)
    return optimizer


def _optimizer(
    make: Make, start: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters, make(parameters, **HYPER)


def _steps(
    make: Make,
    start: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
) -> list[Tensor]:
    """The parameters after one step for each list of gradients."""
    parameters, optimizer = _optimizer(make, start, gradients[0])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _wide(
    start: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    wide = [[tensor.double() for tensor in step] for step in gradients]
    return [tensor.double() for tensor in start], wide


def _like(
    shapes: Sequence[tuple[int, int]], case: Case, request: Request, name: str, spread: float
) -> list[Tensor]:
    return [
        random(shape, case, request.device, f"{name} {index}") * spread
        for index, shape in enumerate(shapes)
    ]


ADAMW8BIT = Op(
    "adamw8bit", "one AdamW step with states in 8 bits", ("",), "optim", _cases, _problems
)
