"""What is measured: cases, their variants, who runs them, and what a right answer is.

A ``Case`` says what to measure and holds no data. Its op builds the inputs once and yields one
``Problem`` per variant (forward, backward, ...). A problem's candidates are ours, the peers and the
ceilings; each is made when its turn comes, so that one that cannot run costs the others nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyft.bench.shapes import Layer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS_CHECKED = 32  # rows compared with the truth in float64; every row is compared with a vendor's
ULPS = 4


@dataclass(frozen=True)
class Request:
    """What a user asked for; the harness takes nothing from anywhere else."""

    device: torch.device
    layers: Sequence[Layer] = ()  # these three, where empty: each op's own
    tokens: Sequence[int] = ()
    dtypes: Sequence[str] = ()  # of DTYPES
    formats: Sequence[str] = ("nf4",)
    backends: Sequence[str] = ("auto",)
    peers: bool = False
    rank: int = 16

    @property
    def machine(self) -> str:
        """Which defaults of ``pyft.bench.shapes`` suit the device."""
        if self.device.type == "cpu":
            return "cpu"
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return "gpu24" if memory >= 23 * 2**30 else "gpu8"


@dataclass(frozen=True)
class Case:
    """One thing to measure, without its data."""

    op: str
    dtype: str
    layer: Layer
    sizes: Mapping[str, int]
    format: str = ""

    @property
    def shape(self) -> str:
        """``M=512 14336x4096 R=16``, or what the sizes say."""
        sizes = dict(self.sizes)
        parts = [f"M={sizes.pop('M')}"] if "M" in sizes else []
        if "N" in sizes:
            parts.append(f"{sizes.pop('N')}x{sizes.pop('K')}")
        return " ".join([*parts, *(f"{name}={size}" for name, size in sizes.items())])

    @property
    def title(self) -> str:
        """One line that names the case."""
        return " ".join(part for part in (self.op, self.shape, self.dtype, self.format) if part)


@dataclass(frozen=True)
class Work:
    """The least an op must do: bytes moved, each input read once and each output written once, and
    floating-point operations; ``copied`` is the size of the tensor the copy beside it copies.
    """

    bytes: int
    flops: int
    copied: int


@dataclass(frozen=True)
class Verdict:
    """How far an answer is from the truth, and how far it may be."""

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the answer may be timed; NaN is never right."""
        return self.error <= self.allowed


Check = Callable[[Sequence[Tensor]], Verdict]


@dataclass(frozen=True)
class Call:
    """A candidate ready to run.

    Attributes:
        run: what is timed.
        outputs: what is checked; None checks what ``run`` returns.
        buffers: written by ``run`` and full of NaN before it is checked.
    """

    run: Callable[[], Any]
    outputs: Callable[[], Sequence[Tensor]] | None = None
    buffers: Sequence[Tensor] = ()

    def answer(self) -> Sequence[Tensor]:
        """Run once on poisoned buffers and return the outputs."""
        for buffer in self.buffers:
            buffer.fill_(float("nan") if buffer.is_floating_point() else 255)
        found = self.run() if self.outputs is None else self.outputs()
        return [found] if isinstance(found, Tensor) else list(found)


@dataclass(frozen=True)
class Candidate:
    """An implementation of a problem.

    Attributes:
        make: builds it.
        check: judges its answer.
        package: the distribution whose version is reported.
        left_out: why it is named and not run; "" when it is.
    """

    name: str
    make: Callable[[], Call]
    check: Check
    package: str
    left_out: str = ""


@dataclass(frozen=True)
class Problem:
    """One variant of a case with everybody who runs it."""

    case: Case
    variant: str
    work: Work
    ours: Sequence[Candidate]
    peers: Sequence[Candidate] = ()
    matmul: Callable[[], Any] | None = None  # a vendor matmul of the same shape
    matmul_flops: int = 0


@dataclass(frozen=True)
class Op:
    """An op of the registry.

    Attributes:
        name: as given to `pyft bench`.
        summary: one line.
        variants: of each case, in the order ``problems`` yields them.
        backend_op: its row in ``pyft.backend.IMPLEMENTATIONS``.
        cases: the cases of a request, those that share inputs next to each other.
        problems: builds the inputs of a case, random and seeded, and yields its problems.
    """

    name: str
    summary: str
    variants: tuple[str, ...]
    backend_op: str
    cases: Callable[[Request], list[Case]]
    problems: Callable[[Case, Request], Iterator[Problem]]


def exact(expected: Sequence[Tensor]) -> Check:
    """The same bits, tensor by tensor."""

    def check(found: Sequence[Tensor]) -> Verdict:
        errors = [0.0]
        for ours, truth in zip(found, expected, strict=True):
            if ours.shape != truth.shape or ours.dtype != truth.dtype:
                return Verdict(math.inf, 0.0)
            if not torch.equal(ours, truth):
                difference = _largest(ours.float() - truth.float())
                errors.append(difference if difference > 0 else math.inf)
        return Verdict(max(errors), 0.0)

    return check


def rows_checked(rows: int) -> Tensor:
    """Indices of the rows compared with the truth: first, last, and some between."""
    return torch.linspace(0, rows - 1, min(rows, ROWS_CHECKED)).round().long()


def close(references: Sequence[Tensor], truths: Sequence[Tensor]) -> Check:
    """As exact as the plain PyTorch reference.

    ``references`` are full outputs in the op's dtype, ``truths`` the ``rows_checked`` of each in
    float64. On those rows max|found - truth| <= 2 max|reference - truth| + 4 ulp; everywhere
    max|found - reference| <= twice that, as both may err. The verdict is in units of what is
    allowed.
    """

    def check(found: Sequence[Tensor]) -> Verdict:
        errors = [0.0]
        for ours, reference, truth in zip(found, references, truths, strict=True):
            if ours.shape != reference.shape or ours.dtype != reference.dtype:
                return Verdict(math.inf, 1.0)
            rows = rows_checked(len(reference)).to(reference.device)
            ulp = torch.finfo(reference.dtype).eps * _largest(truth)
            allowed = 2 * _largest(reference[rows].double() - truth) + ULPS * ulp
            errors.append(_largest(ours[rows].double() - truth) / allowed)
            errors.append(_largest(ours.float() - reference.float()) / (2 * allowed))
        return Verdict(_worst(errors), 1.0)

    return check


def near(truths: Sequence[Tensor], allowed: float) -> Check:
    """Within a relative error ``||found - truth|| / ||truth||`` of each: for peers, whose rounding
    is their own. Only the ``rows_checked`` are compared where the truth has fewer rows.
    """

    def check(found: Sequence[Tensor]) -> Verdict:
        errors = [0.0]
        for theirs, truth in zip(found, truths, strict=True):
            if theirs.shape[1:] != truth.shape[1:]:
                return Verdict(math.inf, allowed)
            rows = rows_checked(len(theirs)).to(theirs.device)
            sample = theirs if len(theirs) == len(truth) else theirs[rows]
            errors.append(relative_error(sample, truth))
        return Verdict(_worst(errors), allowed)

    return check


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``||found - truth|| / ||truth||`` in float32 or better."""
    wide = torch.promote_types(truth.dtype, torch.float32)
    return float((found.to(wide) - truth.to(wide)).norm() / truth.to(wide).norm())


def _worst(errors: Sequence[float]) -> float:
    """The largest, NaN where there is one."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
