"""What every implementation of the norm kernels must do, forward and backward: the error rule, with
the reference in float64 as the truth, on outputs that lie in wider memory.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from error_rule import broken_rule
from stored_weights import DTYPES, Output, shifted
from torch import Tensor

from pyft.reference import norm as reference


class NormKernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.norm``."""

    def norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        centered: bool,
        y: Tensor,
        h: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
    ) -> None:
        """x [M, D] -> y, h [M, D], mean, rstd [M]."""

    def norm_backward(
        self,
        dy: Tensor,
        h: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        offset: float,
        dh: Tensor | None,
        dx: Tensor,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """dy [M, D] -> dx [M, D], dweight, dbias [P, D]."""


@dataclass(frozen=True)
class Norm:
    """x [rows, cols] and all like it in rows ``gap`` further apart than they need be, ``shift``
    elements from where wide accesses could start; ``parts`` 0: the weight is frozen.
    """

    rows: int
    cols: int
    dtype: str = "fp32"
    centered: bool = False
    weight: bool = True
    bias: bool = False
    residual: bool = False  # and, in the backward, a gradient that arrives at h
    offset: float = 0.0
    eps: float = 1e-6
    content: str = "normal"
    gap: int = 0
    shift: int = 0
    parts: int = 1


COLUMNS = (1, 7, 16, 33, 64, 100, 257, 4096 + 3)

_ALL = [
    *(Norm(3, cols, dtype) for cols in COLUMNS for dtype in DTYPES),
    *(
        Norm(2, cols, dtype, centered=True, bias=True, residual=True, gap=5, parts=2)
        for cols in COLUMNS
        for dtype in DTYPES
        if cols > 1  # the norm of one centered element is 0, and its gradient nothing but rounding
    ),
    *(Norm(1, 100, dtype, residual=True, offset=1.0, gap=3, shift=1) for dtype in DTYPES),
    *(Norm(9, 72, dtype, offset=1.0, parts=4) for dtype in DTYPES),
    *(Norm(5, 40, dtype, weight=False, offset=1.0, parts=0) for dtype in DTYPES),
    *(Norm(5, 40, dtype, weight=False, centered=True, parts=0, gap=24) for dtype in DTYPES),
    *(Norm(4, 96, dtype, centered=True, shift=3, parts=0) for dtype in DTYPES),
    *(Norm(4, 96, dtype, centered=True, bias=True, parts=0) for dtype in DTYPES),
    *(
        Norm(4, 130, dtype, centered, content=content, residual=content == "zeros")
        for dtype in DTYPES
        for centered in (False, True)
        for content in ("huge", "tiny", "zeros", "far", "constant")
        if not (centered and content == "constant")
    ),
    *(Norm(4, 8192, "fp32", content=content, parts=0) for content in ("constant", "far")),
    Norm(3, 8192, "bf16", centered=True, content="far", eps=1e-5, parts=3),
    Norm(70, 33, "bf16", residual=True, parts=8),  # 9 rows a part: the last has 7
    Norm(5, 33, "fp32", centered=True, bias=True, parts=4),  # two rows a part: the last has none
    Norm(3, 20, "fp16", residual=True, parts=7),
    *(Norm(0, 33, dtype, centered, parts=2) for dtype in DTYPES for centered in (False, True)),
    *(Norm(300, 65, dtype, residual=True, gap=1, parts=5) for dtype in ("fp32", "bf16")),
]

CASES: dict[str, Norm] = {"-".join(map(str, vars(case).values())): case for case in _ALL}
assert len(CASES) == len(_ALL)


def check(case: Norm, kernels: NormKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    generator = torch.Generator().manual_seed(case.rows + case.cols)
    dtype, shape = DTYPES[case.dtype], (case.rows, case.cols)
    weight = bias = None
    if case.weight:
        weight = torch.randn(case.cols, generator=generator).to(dtype)
    if case.bias:
        bias = torch.randn(case.cols, generator=generator).to(dtype)
    x = _values(case, generator).to(dtype)
    residual = _values(case, generator).to(dtype) if case.residual else None
    h = x if residual is None else x + residual
    wrong = _check_forward(case, kernels, device, x, residual, weight, bias, h)
    dy = torch.randn(shape, generator=generator).to(dtype)
    dh = torch.randn(shape, generator=generator).to(dtype) if case.residual else None
    return wrong + _check_backward(case, kernels, device, dy, dh, weight, bias, h)


def _values(case: Norm, generator: torch.Generator) -> Tensor:
    x = torch.randn(case.rows, case.cols, generator=generator)
    if case.content == "huge":  # in fp16 close to the largest number
        return x.clamp(-3, 3) * (1e4 if case.dtype == "fp16" else 1e17)
    if case.content == "tiny":  # in fp16 subnormal
        return x * (1e-6 if case.dtype == "fp16" else 1e-18)
    if case.content == "zeros":
        return torch.where(torch.arange(case.rows)[:, None] % 2 == 0, 0.0, x)
    if case.content == "far":
        return x + 30
    return torch.full_like(x, 0.7) if case.content == "constant" else x


def _reference(
    case: Norm, h: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean and rstd in h's dtype, the last two in fp32 at least."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    mean = wide.mean(-1) if case.centered else None
    spread = wide if mean is None else wide - mean[:, None]
    rstd = torch.rsqrt(spread.square().mean(-1) + case.eps)
    if case.centered:
        return reference.layer_norm(h, weight, bias, case.eps)[0], mean, rstd
    return reference.rms_norm(h, weight, case.eps, offset=case.offset)[0], mean, rstd


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _placed(x: Tensor | None, case: Norm, device: torch.device) -> Tensor | None:
    """x in rows of the case's stride, among NaN."""
    if x is None:
        return None
    if x.dim() == 1:
        return x.to(device)
    storage = torch.full((x.shape[0], x.shape[1] + case.gap), torch.nan, dtype=x.dtype)
    storage[:, : x.shape[1]] = x
    return shifted(storage.to(device), case.shift)[:, : x.shape[1]]


def _check_forward(
    case: Norm,
    kernels: NormKernels,
    device: torch.device,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
) -> str:
    shape = (case.rows, case.cols)
    y = Output(shape, x.dtype, device, case.gap, case.shift)
    sum_ = Output(shape, x.dtype, device, case.gap, case.shift) if case.residual else None
    mean = Output((case.rows,), torch.float32, device) if case.centered else None
    rstd = Output((case.rows,), torch.float32, device)
    inputs = [_placed(t, case, device) for t in (x, residual, weight, bias)]
    outputs = (y.tensor, sum_ and sum_.tensor, mean and mean.tensor, rstd.tensor)
    kernels.norm(*inputs, case.eps, case.offset, case.centered, *outputs)  # type: ignore[arg-type]
    expected = _reference(case, h, weight, bias)
    stats = _reference(case, h.float(), None, None)
    truth = _reference(case, h.double(), _double(weight), _double(bias))
    wrong = broken_rule("y", y.tensor.cpu(), expected[0], truth[0]) + y.outside("y")
    wrong += broken_rule("rstd", rstd.tensor.cpu(), stats[2], truth[2]) + rstd.outside("rstd")
    if mean is not None and stats[1] is not None and truth[1] is not None:
        wrong += broken_rule("mean", mean.tensor.cpu(), stats[1], truth[1]) + mean.outside("mean")
    return wrong + (sum_.differs("h", h) if sum_ is not None else "")


def _gradients(
    case: Norm,
    dy: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
) -> list[Tensor]:
    """By autograd: of h, and of those of weight and bias that are there."""
    leaves = [t.detach().clone().requires_grad_() for t in (h, weight, bias) if t is not None]
    options = iter(leaves[1:])
    with torch.enable_grad():
        y = _reference(
            case,
            leaves[0],
            None if weight is None else next(options),
            None if bias is None else next(options),
        )[0]
        through = leaves[0] * 1  # where the gradient dh arrives
        outputs, arriving = ([y], [dy]) if dh is None else ([y, through], [dy, dh])
        return list(torch.autograd.grad(outputs, leaves, arriving))


def _check_backward(
    case: Norm,
    kernels: NormKernels,
    device: torch.device,
    dy: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
) -> str:
    shape = (case.rows, case.cols)
    _, mean, rstd = _reference(case, h.double(), None, None)
    dx = Output(shape, h.dtype, device, case.gap, case.shift)
    sums = [
        Output((case.parts, case.cols), torch.float32, device) if case.parts and there else None
        for there in (case.weight, case.bias)
    ]
    kernels.norm_backward(
        _placed(dy, case, device),  # type: ignore[arg-type]
        _placed(h, case, device),  # type: ignore[arg-type]
        _placed(weight, case, device),
        None if mean is None else mean.float().to(device),
        rstd.float().to(device),
        case.offset,
        _placed(dh, case, device),
        dx.tensor,
        *(part and part.tensor for part in sums),
    )
    expected = _gradients(case, dy, dh, weight, bias, h)
    wide = [_double(t) for t in (dy, dh, weight, bias, h)]
    truth = _gradients(case, *wide)  # type: ignore[arg-type]
    wrong = broken_rule("dx", dx.tensor.cpu(), expected[0], truth[0]) + dx.outside("dx")
    if not case.parts:
        return wrong
    each = -(-case.rows // case.parts)
    parts = [slice(p * each, (p + 1) * each) for p in range(case.parts)]

    def sums_in(to: torch.dtype) -> list[Tensor]:
        """The gradients of weight and bias, part by part."""
        everywhere = [None if t is None else t.to(to) for t in (weight, bias)]
        found = [_gradients(case, dy[s].to(to), None, *everywhere, h[s].to(to))[1:] for s in parts]
        return [torch.stack(part) for part in zip(*found, strict=True)]

    given = [part for part in sums if part is not None]
    in_fp32, in_fp64 = sums_in(torch.float32), sums_in(torch.float64)
    for name, part, single, double in zip(("dweight", "dbias"), given, in_fp32, in_fp64):  # noqa: B905
        wrong += broken_rule(name, part.tensor.cpu(), single, double) + part.outside(name)
    return wrong
