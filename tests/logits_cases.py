"""What every implementation of the kernels for logits must do: the error rule, with the reference
in float64 as the truth, on rows that lie in wider memory. Infinities and NaN stand where the truth
has them, and a row with NaN changes no other.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from attention_truth import pairwise
from error_rule import broken_rule
from stored_weights import DTYPES, Output
from torch import Tensor

from pyft.native import LogitTile
from pyft.reference import logits as reference


class LogitKernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.logits``."""

    def logit_statistics(
        self,
        tile: LogitTile,
        lse: Tensor,
        target: Tensor | None,
        smooth: Tensor | None,
        mean: Tensor | None,
        cross: Tensor | None,
        top: Tensor | None,
        argmax: Tensor | None,
    ) -> None:
        """z [M, V] -> [M] each."""

    def logit_gradient(
        self,
        tile: LogitTile,
        lse: Tensor,
        mean: Tensor | None,
        g_lse: Tensor,
        g_target: Tensor,
        g_smooth: Tensor | None,
        g_mean: Tensor | None,
        g_cross: Tensor | None,
        threshold: float,
        kept: Tensor | None,
    ) -> None:
        """z [M, V], [M] each -> dz in the place of z, kept [V]."""


@dataclass(frozen=True)
class Logits:
    """z [rows, cols] whose rows are ``gap`` further apart than they need be, ``shift`` elements
    from where wide accesses could start. ``weights``, ``smooth``, ``mean``, ``cross``, ``target``,
    ``top``, ``argmax``: whether the call has them; ``teacher``: none, or its scale and softcap;
    ``threshold``: of what is kept, None: nothing is.
    """

    cols: int
    dtype: str = "fp32"
    rows: int = 4
    gap: int = 0
    shift: int = 0
    content: str = "normal"
    scale: float = 1.0
    softcap: float | None = None
    weights: bool = False
    target: bool = True
    smooth: bool = False
    mean: bool = False
    teacher: tuple[float, float | None] | None = None
    cross: bool = True
    top: bool = False
    argmax: bool = False
    threshold: float | None = None

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


FEATURES = {
    "cols": (1, 7, 64, 1000, 4099),
    "dtype": tuple(DTYPES),
    "layout": ((4, 0, 0), (9, 5, 1), (1, 3, 2)),
    "content": ("normal", "wide", "equal", "spike", "masked", "nan"),
    "scale": (1.0, 0.37),
    "softcap": (None, 5.0),
    "weights": (False, True),
    "target": (True, False),
    "smooth": (False, True),
    "mean": (False, True),
    "teacher": (None, (1.0, None), (0.7, 4.0)),
    "cross": (True, False),
    "top": (False, True),
    "argmax": (False, True),
    "threshold": (None, 2.0**-12, 0.05, 0.0),
}


def _case(layout: tuple[int, int, int], **features: object) -> Logits:
    rows, gap, shift = layout
    return Logits(rows=rows, gap=gap, shift=shift, **features)  # type: ignore[arg-type]


_ALL = [
    *(Logits(cols, dtype) for cols in FEATURES["cols"] for dtype in DTYPES),
    *(_case(**row) for row in pairwise(FEATURES, lambda row: True, seed=7)),
]
CASES: dict[str, Logits] = {str(case): case for case in _ALL}
assert len(CASES) == len(_ALL)

OUTSIDE = (-100, 2**40, -1, -(2**62))  # labels that name no column
BORDER = 0.005  # of a probability: nearer to the threshold, either side is right
SUMS = ("lse", "target", "smooth", "mean", "cross", "top")  # as logit_statistics takes them


@dataclass
class Problem:
    """The tensors of a case on the CPU, ``teacher`` as the head gives it. ``sums``: by the
    reference in fp32 and in float64.
    """

    z: Tensor
    labels: Tensor
    class_weights: Tensor | None
    teacher: Tensor | None
    sums: tuple[reference.Statistics, reference.Statistics]

    @property
    def clean(self) -> Tensor:
        """The rows without NaN."""
        return ~self.z.isnan().any(1)


def problem(case: Logits) -> Problem:
    """The case's numbers, the same at every call."""
    generator = torch.Generator().manual_seed(case.rows * 10007 + case.cols)
    shape = (case.rows, case.cols)
    # a lse near 0 has no rounding of its own that would show
    teacher = 2 * torch.randn(shape, generator=generator) - 2.0
    teacher -= torch.tensor(float(case.cols)).log() / (case.teacher or (1.0,))[0]
    z = 2 * torch.randn(shape, generator=generator)
    wide = 6e4 * torch.rand(shape, generator=generator) - 3e4
    labels = torch.randint(case.cols, (case.rows,), generator=generator)
    named = (0, case.cols - 1, case.cols, *OUTSIDE)[: case.rows - 1]
    labels[1 : 1 + len(named)] = torch.tensor(named, dtype=torch.int64)
    weights = torch.rand(case.cols, generator=generator) + 0.5
    weights[0] = 0.0
    if case.content == "wide":
        z = wide
    elif case.content == "equal":
        z = torch.full(shape, 3.25)
    elif case.content == "spike":
        z[:, case.cols // 2] = 3e4
    elif case.content == "masked":
        z[:, 1::3] = teacher[:, 1::3] = -torch.inf
    elif case.content == "nan":
        z[case.rows // 2, case.cols // 2] = torch.nan
    dtype = DTYPES[case.dtype]
    z, teacher = z.to(dtype), teacher.to(dtype)
    given = weights if case.weights else None
    taught = None if case.teacher is None else teacher

    def statistics(wide: torch.dtype) -> reference.Statistics:
        t = None
        if case.teacher is not None:
            t = reference.capped(teacher.to(wide), *case.teacher)
        w = None if given is None else given.to(wide)
        return reference.logit_statistics(z.to(wide), labels, w, case.scale, case.softcap, t)

    return Problem(z, labels, given, taught, (statistics(torch.float32), statistics(torch.float64)))


def check(case: Logits, kernels: LogitKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    given = problem(case)
    return _check_statistics(case, given, kernels, device) + _check_gradient(
        case, given, kernels, device
    )


def _tile(case: Logits, given: Problem, device: torch.device) -> tuple[LogitTile, Output]:
    """What both kernels take, and the memory of its z."""
    z = Output((case.rows, case.cols), given.z.dtype, device, case.gap, case.shift)
    z.tensor.copy_(given.z)
    teacher = lse = None
    if given.teacher is not None and case.teacher is not None:
        place = Output((case.rows, case.cols), given.z.dtype, device, case.gap + 2, case.shift + 1)
        teacher = place.tensor.copy_(given.teacher)
        lse = reference.capped(given.teacher.double(), *case.teacher).logsumexp(1)
        lse = lse.float().to(device)
    weights = None if given.class_weights is None else given.class_weights.to(device)
    taught = (teacher, lse, *(case.teacher or (1.0, None)))
    return (
        (z.tensor, given.labels.to(device), weights, case.scale, case.softcap, *taught),
        z,
    )


def _wrong(name: str, found: Tensor, expected: Tensor, truth: Tensor) -> str:
    """The error rule where the truth is finite; what the truth is elsewhere."""
    finite = truth.isfinite()
    same = (found == truth) | (found.isnan() & truth.isnan()) | finite
    wrong = ""
    if not same.all():
        wrong = f"{name} is {found[~same].tolist()[:8]}, not {truth[~same].tolist()[:8]}; "
    return wrong + broken_rule(name, found[finite], expected[finite], truth[finite])


def _check_statistics(
    case: Logits, given: Problem, kernels: LogitKernels, device: torch.device
) -> str:
    tile, z = _tile(case, given, device)
    before = z.buffer.cpu()
    there = (True, case.target, case.smooth, case.mean, case.cross and case.teacher, case.top)
    outputs = [
        Output((case.rows,), torch.float32, device, shift=case.shift) if wanted else None
        for wanted in there
    ]
    argmax = Output((case.rows,), torch.int64, device) if case.argmax else None
    sums = [output and output.tensor for output in outputs]
    kernels.logit_statistics(tile, *sums, argmax and argmax.tensor)  # type: ignore[arg-type]
    wrong = ""
    if not torch.equal(z.buffer.cpu().nan_to_num(77.0), before.nan_to_num(77.0)):
        wrong += "z was written to; "
    expected, truth = given.sums
    for name, output in zip(SUMS, outputs, strict=True):
        if output is not None:
            rows = given.clean if name == "target" else slice(None)
            values = (output.tensor.cpu(), getattr(expected, name), getattr(truth, name))
            wrong += _wrong(name, *(value[rows] for value in values)) + output.outside(name)
    if argmax is not None:
        wrong += _check_argmax(case, given, argmax.tensor.cpu()) + argmax.outside("argmax")
    return wrong


def _check_argmax(case: Logits, given: Problem, found: Tensor) -> str:
    if ((found < 0) | (found >= case.cols)).any():
        return f"argmax {found.tolist()} names no column; "
    clean = given.clean
    u = reference.capped(given.z.double(), case.scale, case.softcap)[clean]
    found, first = found[clean], given.z.float()[clean].max(1).indices
    # logits that differ may be the same number when they are capped
    at, largest = u.gather(1, found[:, None])[:, 0], u.max(1).values
    near = (largest - at <= 1e-6 * largest.abs()) & (case.softcap is not None) & (found < first)
    right = (found == first) | near
    return "" if right.all() else f"argmax is {found.tolist()}, not {first.tolist()}; "


def _check_gradient(
    case: Logits, given: Problem, kernels: LogitKernels, device: torch.device
) -> str:
    tile, z = _tile(case, given, device)
    generator = torch.Generator().manual_seed(case.cols)
    lse, mean = given.sums[1].lse.float(), given.sums[1].mean.float() if case.mean else None
    there = (True, True, case.smooth, case.mean, case.cross and case.teacher)
    g = [torch.randn(case.rows, generator=generator) if wanted else None for wanted in there]
    kept = Output((case.cols,), torch.uint8, device)
    kept.tensor.zero_()
    kept.tensor[case.cols // 3] = 1  # by another row, and stays
    threshold = case.threshold
    kernels.logit_gradient(
        tile,
        *(None if x is None else x.to(device) for x in (lse, mean, *g)),  # type: ignore[arg-type]
        0.0 if threshold is None else threshold,
        None if threshold is None else kept.tensor,
    )

    def gradient(wide: torch.dtype) -> Tensor:
        teacher = None
        if given.teacher is not None and case.teacher is not None:
            teacher = reference.capped(given.teacher.to(wide), *case.teacher)
        numbers = (
            None if x is None else x.to(wide) for x in (given.class_weights, teacher, lse, mean, *g)
        )
        weights, teacher, *sums = numbers
        return reference.logit_gradient(
            given.z.to(wide), given.labels, weights, case.scale, case.softcap, teacher, *sums
        )  # type: ignore[arg-type]

    expected = gradient(torch.float32).to(given.z.dtype)
    wrong = _wrong("dz", z.tensor.cpu(), expected, gradient(torch.float64)) + z.outside("dz")
    if threshold is not None:
        wrong += _check_kept(case, given, lse, threshold, kept.tensor.cpu()) + kept.outside("kept")
    return wrong


def _check_kept(case: Logits, given: Problem, lse: Tensor, threshold: float, found: Tensor) -> str:
    u = reference.capped(given.z.double(), case.scale, case.softcap)
    p = (u - lse.double()[:, None]).exp()
    sure = (p >= threshold * (1 + BORDER)).any(0)
    able = (p >= threshold * (1 - BORDER)).any(0)
    named = given.labels[(given.labels >= 0) & (given.labels < case.cols)]
    for columns in (sure, able):
        columns[named] = True
        columns[case.cols // 3] = True
    right = (found == 1) & able | (found == 0) & ~sure
    at = (~right).nonzero()[:, 0].tolist()
    return f"kept is {found[at].tolist()[:8]} at {at[:8]}; " if at else ""
