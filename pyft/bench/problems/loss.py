"""The loss over a vocabulary, beside what torch and others have.

    frozen, trained   whether the head gets a gradient
    random, peaked    logits of a fresh model (standard normal), or as of a trained one: most labels
                      have most of the probability

M rows, V labels, D features. Work counts the matmuls that have to be, not those done again.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pyft
from pyft.backend import chosen
from pyft.bench import peers
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
from pyft.bench.problems.weights import random
from pyft.bench.shapes import Layer
from pyft.ops import logits

VARIANTS = ("forward", "forward+backward")
KINDS = ("frozen random", "frozen peaked", "trained random")
# (M, V, D): of Gemma-2-2B and Llama-3.1-8B, of Llama-3.2-1B, and what a CPU does in a second
SIZES = {
    "cpu": ((1024, 32000, 1024),),
    "gpu8": ((2048, 128256, 2048),),
    "gpu24": ((8192, 256000, 2304), (16384, 128256, 4096)),
}
LABEL_LOGIT = (6.0, 18.0)  # of peaked rows, from the first to the last
TRUTH_LOGITS = 2**25  # in memory at once
TILE = 64 << 20  # bytes of the tile that ``logits`` is measured on
# ||peer - truth|| / ||truth|| that is rounding; libraries sum in the weight's dtype
NEAR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}
MATMUL = 1024  # rows of the vendor's matmul beside it


def _cases(op: str, kinds: Sequence[str], request: Request) -> list[Case]:
    """``--shapes`` name linears, of which a loss has none."""
    return [
        Case(op, dtype, Layer(v, d), {"M": m, "V": v, "D": d}, kind)
        for given, v, d in SIZES[request.machine]
        for m in request.tokens or (given,)
        for dtype in request.dtypes or ("bf16",)
        for kind in kinds
    ]


def _inputs(case: Case, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels."""
    m, v, d = (case.sizes[name] for name in "MVD")
    hidden = random((m, d), case, request.device, "hidden")
    weight = random((v, d), case, request.device, "weight") * d**-0.5
    generator = torch.Generator(device=request.device).manual_seed(m)
    labels = torch.randint(v, (m,), generator=generator, device=request.device)
    labels[0] = rows_checked(v)[0]  # a head's gradient is largest where a label is
    if case.format.endswith("peaked"):
        strength = torch.linspace(*LABEL_LOGIT, m, device=request.device)[:, None]
        hidden = (hidden + strength * weight[labels]).to(hidden.dtype)
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The mean loss [1], its gradients in hidden and weight computed in ``dtype``, softmax in fp32
    or better, some rows at a time.
    """
    wide = torch.promote_types(dtype, torch.float32)
    m, v = len(hidden), len(weight)
    w = weight.to(dtype)
    loss, dh = torch.zeros(1, dtype=torch.float64), torch.empty_like(hidden, dtype=dtype)
    dw = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    step = max(1, TRUTH_LOGITS // v)
    for start in range(0, m, step):
        rows = slice(start, min(m, start + step))
        h, y = hidden[rows].to(dtype), labels[rows]
        z = (h @ w.t()).to(wide)
        loss += F.cross_entropy(z, y, reduction="sum").double().cpu()
        z = z.softmax(1)
        z[torch.arange(len(y), device=y.device), y] -= 1
        dz = (z / m).to(dtype)
        dh[rows] = dz @ w
        dw += (dz.t() @ h).to(wide)
    return [(loss / m).to(wide).to(hidden.device), dh, dw.to(dtype)]


def _problems(case: Case, request: Request) -> Iterator[Problem]:
    hidden, weight, labels = _inputs(case, request)
    trained = case.format.startswith("trained")
    references, truths = (plain(hidden, weight, labels, t) for t in (hidden.dtype, torch.float64))
    truths = [x[rows_checked(len(x)).to(x.device)] for x in truths]
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    few = hidden.detach()[:MATMUL]
    head = weight.detach().t()
    for variant, work in loss_work(case, hidden.element_size(), trained).items():
        part = slice(1) if variant == "forward" else slice(1 + len(leaves))
        check = close(references[part], truths[part])
        peer_check = near(truths[part], NEAR[hidden.dtype])

        def call(function: Callable[..., Tensor], variant: str = variant) -> Call:
            return _call(partial(function, hidden, weight, labels), leaves, variant)

        yield Problem(
            case,
            variant,
            work,
            on_backends(request, case.op, partial(call, OURS[case.op]), check),
            [
                Candidate(name, partial(call, function), peer_check, package)
                for name, (package, function) in _others(hidden.device, case.op).items()
            ],
            partial(torch.mm, few, head),
            2 * len(few) * head.numel(),
        )


def _call(function: Callable[[], Tensor], leaves: Sequence[Tensor], variant: str) -> Call:
    """A forward without gradients, or both."""
    if variant == "forward":
        evaluate = torch.no_grad()(function)
        return Call(evaluate, lambda: [evaluate().view(1).float()])

    def outputs() -> list[Tensor]:
        loss = function()
        return [loss.detach().view(1).float(), *torch.autograd.grad(loss, leaves)]

    return Call(lambda: torch.autograd.grad(function(), leaves), outputs)


def loss_work(case: Case, itemsize: int, trained: bool) -> dict[str, Work]:
    """Work of each variant: hidden, weight and their gradients each once."""
    m, v, d = (case.sizes[name] for name in "MVD")
    inputs, matmul = (m * d + v * d) * itemsize, 2 * m * v * d
    gradients = m * d * itemsize + trained * v * d * itemsize
    both = Work(inputs + gradients, (2 + trained) * matmul, v * d * itemsize)
    return {"forward": Work(inputs, matmul, v * d * itemsize), "forward+backward": both}


def _of_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -pyft.linear_logprobs(hidden, weight, labels).logprob.mean()


OURS: dict[str, Callable[..., Tensor]] = {
    "linear_cross_entropy": pyft.linear_cross_entropy,
    "linear_logprobs": _of_logprobs,
}


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def _torch_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = F.linear(hidden, weight).float().log_softmax(1)
    return -logprobs.gather(1, labels[:, None]).mean()


def _others(device: torch.device, op: str) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name -> package and function. Libraries that leave gradients out below a threshold run so,
    their default, and without.
    """
    if op == "linear_logprobs":
        return {"torch log_softmax": ("torch", _torch_logprobs)}
    found: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "torch cross_entropy": ("torch", _torch),
        "torch linear_cross_entropy": ("torch", _torch_fused),
    }
    if device.type == "cuda":
        found |= {
            "torch linear_cross_entropy chunked": ("torch", _torch_chunked),
            "torch compiled": ("torch", _compiled()),
            "liger": ("liger-kernel", _liger),
            "liger fp32 sums": ("liger-kernel", partial(_liger, accum_dtype=torch.float32)),
            "cut-cross-entropy": ("cut-cross-entropy", _cut),
            "cut-cross-entropy unfiltered": ("cut-cross-entropy", partial(_cut, filter_eps=None)),
        }
    return found


def _torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """From torch 2.13 on; on a CPU faster so than in chunks, which its options are for."""
    return F.linear_cross_entropy(hidden, weight, labels)


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def _compiled() -> Callable[..., Tensor]:
    torch.compiler.reset()
    found: Any = torch.compile(_torch, dynamic=False)
    return found  # type: ignore[no-any-return]


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    function = peers.load("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    found: Any = function(hidden, weight, labels, **options)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _cut(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    found: Tensor = peers.load("cut_cross_entropy").linear_cross_entropy(
        hidden, weight, labels, **options
    )
    return found


def _logits(case: Case, request: Request) -> Iterator[Problem]:
    """A tile of rows, each of whose two passes is measured by itself."""
    v = case.sizes["V"]
    dtype = random((1,), case, request.device, "dtype").dtype
    m = max(1, min(case.sizes["M"], TILE // (v * dtype.itemsize)))
    z = random((m, v), case, request.device, "z")
    labels = torch.arange(m, device=request.device) * (v // m)
    references, truths = (_statistics(z.to(t), labels) for t in (dtype, torch.float64))
    ones = torch.ones(m, device=request.device)
    lse = references[0]
    tile = z.numel() * z.element_size()
    gradients = tuple([_gradient(z.to(t), labels)] for t in (dtype, torch.float64))
    buffer = torch.empty_like(z)

    def in_place() -> Tensor:  # of whatever lies there: a copy first would be timed too
        into = logits.Tile(buffer, labels, None, 1.0, None)
        logits.gradient_(into, lse, None, logits.Weights(ones, -ones), chosen())
        return buffer

    def of_z() -> Sequence[Tensor]:
        buffer.copy_(z)
        return [in_place()]

    def in_torch() -> Tensor:
        found = torch.softmax(z, 1)
        found[torch.arange(m, device=z.device), labels] -= 1
        return found

    def sums() -> Sequence[Tensor]:
        found = logits.statistics(
            logits.Tile(z, labels, None, 1.0, None), logits.Wanted(), chosen()
        )
        return [found.lse, found.target]

    def torch_sums() -> Sequence[Tensor]:
        return [torch.logsumexp(z, 1).float(), z.gather(1, labels[:, None])[:, 0].float()]

    rows = rows_checked(m).to(z.device)
    for variant, ours, theirs, name, (reference, truth), moved in (
        ("statistics", Call(sums), torch_sums, "torch logsumexp", (references, truths), tile),
        ("gradient", Call(in_place, of_z), in_torch, "torch softmax", gradients, 2 * tile),
    ):
        truth = [x[rows] for x in truth]
        yield Problem(
            case,
            variant,
            Work(moved, 0, tile),
            on_backends(request, "logits", partial(_same, ours), close(reference, truth)),
            [Candidate(name, partial(Call, theirs), near(truth, NEAR[dtype]), "torch")],
        )


def _same(call: Call) -> Call:
    return call


def _statistics(z: Tensor, labels: Tensor) -> list[Tensor]:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return [wide.logsumexp(1), wide.gather(1, labels[:, None])[:, 0]]


def _gradient(z: Tensor, labels: Tensor) -> Tensor:
    found = z.to(torch.promote_types(z.dtype, torch.float32)).softmax(1)
    found[torch.arange(len(z), device=z.device), labels] -= 1
    return found.to(z.dtype)


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    "the loss of a head without its logits",
    VARIANTS,
    "linear_cross_entropy",
    partial(_cases, "linear_cross_entropy", KINDS),
    _problems,
)
LINEAR_LOGPROBS = Op(
    "linear_logprobs",
    "log-probabilities of labels without logits",
    VARIANTS,
    "linear_logprobs",
    partial(_cases, "linear_logprobs", KINDS[:1]),
    _problems,
)
LOGITS = Op(
    "logits",
    "what the loss takes of a tile of logits, and its gradient",
    ("statistics", "gradient"),
    "logits",
    partial(_cases, "logits", ("random",)),
    _logits,
)
