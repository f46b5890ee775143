"""Linears over a frozen weight, plain or quantized, with and without an adapter.

    qlinear       y = x Wᵀ, dX = dY W                                       W quantized
    lora_linear   y = x Wᵀ + s (x Aᵀ) Bᵀ and dX, dA, dB                     W plain or quantized

    x [M, K]   W [N, K]   A [R, K]   B [N, R]   y, dY [M, N]

Least work: each tensor is read or written once, W in the form it is stored in. The frozen linear
over the decoded weight (dX only) is the floor, a vendor matmul of M N K the ceiling.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

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
    rows_checked,
)
from pyft.bench.problems.quantize import BNB_FORMATS, SLACK
from pyft.bench.problems.truths import part_of
from pyft.bench.problems.weights import PLAIN, Weight, random, weight
from pyft.bench.shapes import default_layers, default_tokens

SCALE = 2.0
Makers = dict[str, Callable[[], Call]]


def linear_work(
    m: int, n: int, k: int, itemsize: int, stored: int, rank: int = 0
) -> dict[str, Work]:
    """Work of each variant; ``stored`` bytes of weight, read once forward and once backward.

    Forward: 2 M N K, and 2 M R (K + N) for the adapter. Backward: the same for dX, and as much
    again of the adapter's for dA and dB.
    """
    x, y, adapter = m * k * itemsize, m * n * itemsize, rank * (k + n) * itemsize
    low_rank = 2 * m * rank * (k + n)
    saved = x if rank else 0  # x is read again for dA
    forward = Work(stored + x + y + adapter, 2 * m * n * k + low_rank, n * k * itemsize)
    backward = Work(
        stored + y + saved + x + 2 * adapter, 2 * m * n * k + 2 * low_rank, forward.copied
    )
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops, forward.copied)
    return dict(zip(VARIANTS, (forward, backward, both), strict=True))


def _cases(op: str, request: Request) -> list[Case]:
    plain = (PLAIN,) if op == "lora_linear" else ()
    rank = {"R": request.rank} if op == "lora_linear" else {}
    return [
        Case(op, dtype, layer, {"M": m, "N": layer.n, "K": layer.k, **rank}, format)
        for layer in request.layers or default_layers(request.machine)[-1:]
        for dtype in request.dtypes or ("bf16",)
        for format in (*request.formats, *plain)
        for m in request.tokens or default_tokens(request.machine)
    ]


def _qlinear(case: Case, request: Request) -> Iterator[Problem]:
    w = weight(case, request.device)
    x, dy = _activations(case, request.device)
    makers = gradients(lambda x: pyft.lora_linear(x, w.used, None, None), [x], dy)
    frozen = gradients(lambda x: linear(x, w.decoded), [x], dy)
    others: dict[str, Callable[[], Makers]] = {}
    if case.format in BNB_FORMATS:
        others["bitsandbytes"] = lambda: gradients(w.bitsandbytes.linear, [x], dy)
    if case.format == "nf4":
        others["torchao"] = lambda: gradients(lambda x: peers.torchao_linear(x, w.torchao), [x], dy)
    yield from _problems(case, request, w, x, [], dy, makers, frozen, others)


def _lora_linear(case: Case, request: Request) -> Iterator[Problem]:
    w = weight(case, request.device)
    x, dy = _activations(case, request.device)
    n, k, r = (case.sizes[name] for name in "NKR")
    a = (random((r, k), case, request.device, "a") * k**-0.5).requires_grad_()
    b = (random((n, r), case, request.device, "b") * r**-0.5).requires_grad_()
    makers = gradients(lambda x, a, b: pyft.lora_linear(x, w.used, a, b, SCALE), [x, a, b], dy)
    frozen = gradients(lambda x: linear(x, w.decoded), [x], dy)

    def peft(compiled: bool = False) -> Makers:
        layer = peers.peft_lora(w.linear, a, b, SCALE)
        adapters = [part for part in layer.parameters() if part.requires_grad]
        run = peers.compiled(layer) if compiled else layer
        return gradients(lambda x, a, b: run(x), [x, *adapters], dy)

    name = "peft" if case.format == PLAIN else "peft+bitsandbytes"
    others: dict[str, Callable[[], Makers]] = {}
    if case.format in (PLAIN, *BNB_FORMATS):
        others[name] = peft
        if request.device.type == "cuda":
            others[f"{name}+torch.compile"] = partial(peft, compiled=True)
    yield from _problems(case, request, w, x, [a, b], dy, makers, frozen, others)


def _problems(
    case: Case,
    request: Request,
    w: Weight,
    x: Tensor,
    adapter: Sequence[Tensor],
    dy: Tensor,
    makers: Makers,
    frozen: Makers,
    others: dict[str, Callable[[], Makers]],
) -> Iterator[Problem]:
    """The three variants with their checks, the frozen linear and the peers."""
    m, n, k = (case.sizes[name] for name in "MNK")
    works = linear_work(m, n, k, x.element_size(), w.stored_bytes, case.sizes.get("R", 0))
    others = {name: cache(make) for name, make in others.items()}  # made once for all variants
    truths, references = _truths(x, w.decoded, adapter, dy)
    loose, _ = _truths(x, w.plain, adapter, dy)
    floor, floor_references = _truths(x, w.decoded, [], dy)
    for variant, work in works.items():
        wanted = part_of(variant, 1)
        check = close(references[wanted], truths[wanted])
        floor_check = close(floor_references[wanted], floor[wanted])
        theirs = check if case.format == PLAIN else _loosely(w, loose[wanted])
        yield Problem(
            case,
            variant,
            work,
            on_backends(request, "lora_linear", makers[variant], check),
            [
                Candidate("torch frozen linear", frozen[variant], floor_check, "torch"),
                *_candidates(others, variant, theirs),
            ],
            matmul=lambda: torch.mm(x.detach(), w.decoded.t()),
            matmul_flops=2 * m * n * k,
        )


def _candidates(
    others: dict[str, Callable[[], Makers]], variant: str, check: Check
) -> list[Candidate]:
    def make(name: str) -> Call:
        return others[name]()[variant]()

    return [Candidate(name, partial(make, name), check, name.split("+")[0]) for name in others]


def _loosely(w: Weight, truths: Sequence[Tensor]) -> Check:
    """For peers that pack the weight themselves: within the format's error of the plain weight."""
    return near(truths, SLACK * w.quantization_error)


def _activations(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    m, n, k = (case.sizes[name] for name in "MNK")
    x = random((m, k), case, device, "x").requires_grad_()
    return x, random((m, n), case, device, "dy")


def _truths(
    x: Tensor, w: Tensor, adapter: Sequence[Tensor], dy: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """y, dX, dA, dB: their checked rows in float64, and all of them by plain torch in their dtype.

    Rows of y and dX need the same rows of x and dY only; dA and dB need them all.
    """
    x, dy = x.detach(), dy.detach()
    references = [linear(x, w), dy @ w]
    rows = rows_checked(len(x)).to(x.device)
    wide_x, wide_dy, wide_w = x[rows].double(), dy[rows].double(), w.double()
    truths = [wide_x @ wide_w.t(), wide_dy @ wide_w]
    del wide_w
    if adapter:
        a, b = (part.detach() for part in adapter)
        references[0] += SCALE * (x @ a.t()) @ b.t()
        references[1] += SCALE * (dy @ b) @ a
        references += [SCALE * (dy @ b).t() @ x, SCALE * dy.t() @ (x @ a.t())]
        wide_a, wide_b, all_x, all_dy = a.double(), b.double(), x.double(), dy.double()
        truths[0] += SCALE * (wide_x @ wide_a.t()) @ wide_b.t()
        truths[1] += SCALE * (wide_dy @ wide_b) @ wide_a
        da = SCALE * (all_dy @ wide_b).t() @ all_x
        db = SCALE * all_dy.t() @ (all_x @ wide_a.t())
        truths += [part[rows_checked(len(part)).to(x.device)] for part in (da, db)]
    return truths, references


QLINEAR = Op(
    "qlinear",
    "linear over a quantized weight, with the input's gradient",
    VARIANTS,
    "lora_linear",
    partial(_cases, "qlinear"),
    _qlinear,
)
LORA_LINEAR = Op(
    "lora_linear",
    "linear with a LoRA adapter over a plain and a quantized weight, with all gradients",
    VARIANTS,
    "lora_linear",
    partial(_cases, "lora_linear"),
    _lora_linear,
)
