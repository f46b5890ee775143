"""The parts of the LoRA ops beside what they could be instead.

    lora_matmul   forward   x Wᵀ + s S Bᵀ        x [M, K]   W [N, K]   S [M, R]   B [N, R]
                  backward  dY W + s S A         dY [M, N]             S [M, R]   A [R, K]
    skinny        project   S = drop(x) Aᵀ       x [M, K]   A [R, K]
                  reduce    dA = Sᵀ drop(x)

The ways of ``lora_matmul`` are measured against each other, and against the bare matmul:

    augmented     one vendor matmul [x | S] [W | s B]ᵀ where x already lies in a buffer with room
                  for S, and W in one with room for s B; copying S and s B there is timed. Forward
                  only: no dY comes with room beside it.
    addmm         the vendor's matmul, then a second that adds s S Bᵀ
    epilogue      the Triton matmul that starts from s S Bᵀ; on a GPU only

Which is the fastest on a device belongs into ``pyft.ops.lora_matmul.EPILOGUE``, and whether the
kernels of ``skinny`` are faster than torch's matmul where nothing is dropped into
``pyft.ops.skinny.UNDROPPED``.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import dropout

from pyft.backend import device_guard, implementation, obstacle
from pyft.bench.backends import on_backends
from pyft.bench.problem import (
    Call,
    Candidate,
    Case,
    Op,
    Problem,
    Request,
    Work,
    close,
    near,
    rows_checked,
)
from pyft.bench.problems.linear import SCALE
from pyft.bench.problems.weights import PLAIN, random, weight
from pyft.bench.shapes import Layer, default_layers, default_tokens
from pyft.ops import skinny
from pyft.ops.dropout import Dropout
from pyft.ops.lora_matmul import LowRank, Wide
from pyft.reference import skinny as plain_skinny

P, SEED = 0.1, 20
# Twice what ||drop(x) Aᵀ - x Aᵀ|| / ||x Aᵀ|| is expected to be, with any mask: for torch's own.
ANY_MASK_ERROR = 2 * (P / (1 - P)) ** 0.5


def lora_matmul_work(m: int, n: int, k: int, rank: int, itemsize: int) -> Work:
    """Work of either direction: M N K and M R (N, the columns of what comes out)."""
    elements = m * k + n * k + m * n + rank * (m + n)
    return Work(elements * itemsize, 2 * m * n * (k + rank), n * k * itemsize)


def skinny_work(m: int, k: int, rank: int, itemsize: int) -> Work:
    """Work of either product: bound by memory, x is read once."""
    return Work((m * k + rank * (m + k)) * itemsize, 0, m * k * itemsize)


def _cases(op: str, request: Request) -> list[Case]:
    layers = list(request.layers or default_layers(request.machine))
    if op == "skinny":
        layers = list({layer.k: layer for layer in layers}.values())
    format = PLAIN if op == "lora_matmul" else ""
    return [
        Case(op, dtype, layer, {"M": m, **_sizes(op, layer), "R": request.rank}, format)
        for layer in layers
        for dtype in request.dtypes or ("bf16",)
        for m in request.tokens or default_tokens(request.machine)
    ]


def _sizes(op: str, layer: Layer) -> dict[str, int]:
    return {"K": layer.k} if op == "skinny" else {"N": layer.n, "K": layer.k}


def _lora_matmul(case: Case, request: Request) -> Iterator[Problem]:
    m, n, k, r = (case.sizes[name] for name in "MNKR")
    w = weight(case, request.device).plain
    for variant, right in (("forward", w.t()), ("backward", w)):
        inner, columns = right.shape
        x = random((m, inner), case, request.device, f"{variant} x")
        s = random((m, r), case, request.device, f"{variant} s")
        b = random((r, columns), case, request.device, f"{variant} b") * r**-0.5
        if variant == "forward":
            b = b.t().contiguous().t()  # Bᵀ of B [N, R]
        low = LowRank(s, b, SCALE)
        rows = rows_checked(m).to(x.device)
        truth = x[rows].double() @ right.double() + SCALE * (s[rows].double() @ b.double())
        check = close([x @ right + SCALE * (s @ b)], [truth])
        ways = {"addmm": partial(_addmm, x, right, low)}
        if variant == "forward":
            ways = {"augmented": partial(_augmented, x, w, low), **ways}
        if obstacle("lora_matmul", "triton") is None and x.is_cuda:
            ways["epilogue"] = partial(_epilogue, x, right, low)
        floor = close([x @ right], [x[rows].double() @ right.double()])
        yield Problem(
            case,
            variant,
            lora_matmul_work(m, columns, inner, r, x.element_size()),
            [Candidate(name, make, check, "pyft") for name, make in ways.items()],
            [Candidate("torch matmul alone", partial(_bare, x, right), floor, "torch")],
            matmul=_bare(x, right).run,
            matmul_flops=2 * m * n * k,
        )


def _augmented(x: Tensor, w: Tensor, low: LowRank) -> Call:
    (m, k), (n, _), rank = x.shape, w.shape, low.s.shape[1]
    inputs, weights, y = x.new_empty(m, k + rank), x.new_empty(n, k + rank), x.new_empty(m, n)
    inputs[:, :k], weights[:, :k] = x, w
    wide = Wide(inputs, rank, 0)

    def run() -> Tensor:
        inputs[:, k:].copy_(low.s)
        wide.fill(weights, low)
        return torch.mm(inputs, weights.t(), out=y)

    return Call(run, buffers=[y])


def _addmm(x: Tensor, right: Tensor, low: LowRank) -> Call:
    y = x.new_empty(x.shape[0], right.shape[1])

    def run() -> Tensor:
        torch.mm(x, right, out=y)
        low.add_to(y)
        return y

    return Call(run, buffers=[y])


def _epilogue(x: Tensor, right: Tensor, low: LowRank) -> Call:
    y = x.new_empty(x.shape[0], right.shape[1])
    kernels = implementation("lora_matmul", "triton")

    def run() -> Tensor:
        with device_guard(x):
            kernels.lora_matmul(x, right, low.s, low.b, low.scale, None, y)
        return y

    return Call(run, buffers=[y])


def _bare(x: Tensor, right: Tensor) -> Call:
    y = x.new_empty(x.shape[0], right.shape[1])
    return Call(partial(torch.mm, x, right, out=y), buffers=[y])


def _skinny(case: Case, request: Request) -> Iterator[Problem]:
    m, k, r = (case.sizes[name] for name in "MKR")
    x = random((m, k), case, request.device, "x")
    a = random((r, k), case, request.device, "a") * k**-0.5
    s = random((m, r), case, request.device, "s")
    work = skinny_work(m, k, r, x.element_size())
    for variant in SKINNY_VARIANTS:
        function, _, dropped = variant.partition("+")
        p = P if dropped else 0.0
        drop = Dropout(torch.tensor(SEED) if dropped else None, p)
        project = function == "project"
        thin, reference = (a, plain_skinny.project) if project else (s, plain_skinny.reduce)
        first, second = (x, thin) if project else (thin, x)
        whole = reference(first.double(), second.double(), 1.0, p, SEED)
        rows = rows_checked(len(whole)).to(x.device)
        check = close([reference(first, second, 1.0, p, SEED)], [whole[rows]])
        peer_check = check
        if dropped:
            peer_check = near([reference(first.double(), second.double())], ANY_MASK_ERROR)
        ours = partial(skinny.project if project else skinny.reduce, first, second, 1.0, drop)
        theirs = partial(_torch_project if project else _torch_reduce, first, second, p)
        name = "torch dropout and matmul" if dropped else "torch matmul"
        yield Problem(
            case,
            variant,
            work,
            on_backends(request, "skinny", partial(Call, ours), check),
            [Candidate(name, partial(Call, theirs), peer_check, "torch")],
        )


def _torch_project(x: Tensor, a: Tensor, p: float) -> Tensor:
    return torch.mm(dropout(x, p) if p else x, a.t())


def _torch_reduce(s: Tensor, x: Tensor, p: float) -> Tensor:
    return torch.mm(s.t(), dropout(x, p) if p else x)


SKINNY_VARIANTS = ("project", "reduce", "project+dropout", "reduce+dropout")
LORA_MATMUL = Op(
    "lora_matmul",
    "a matmul with a low-rank product, each way it can be done",
    ("forward", "backward"),
    "lora_matmul",
    partial(_cases, "lora_matmul"),
    _lora_matmul,
)
SKINNY = Op(
    "skinny",
    "the adapter's products, with and without dropout of the input",
    SKINNY_VARIANTS,
    "skinny",
    partial(_cases, "skinny"),
    _skinny,
)
