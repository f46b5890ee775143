"""What every implementation of the activations must do, gated or not, forward and backward: the
error rule, with the reference in float64 as the truth, on outputs that lie in wider memory or are
inputs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from error_rule import broken_rule
from stored_weights import DTYPES, Output
from torch import Tensor

from pyft.reference import glu as reference


class GluKernels(Protocol):
    """The functions of ``pyft.native`` and ``pyft.kernels.glu``."""

    def glu(self, gate: Tensor, up: Tensor | None, activation: str, out: Tensor) -> None:
        """gate, up [M, I] -> out [M, I]."""

    def glu_backward(
        self,
        dy: Tensor,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        dgate: Tensor,
        dup: Tensor | None,
        out: Tensor | None,
    ) -> None:
        """dy, gate, up [M, I] -> dgate, dup, out [M, I]."""


@dataclass(frozen=True)
class Glu:
    """gate and up [rows, cols], halves of one buffer where ``halves``, else rows ``gap`` further
    apart than they need be, ``shift`` elements from where wide accesses could start; ``again``: the
    backward gives the output too; ``in_place``: its outputs are its inputs' memory.
    """

    rows: int
    cols: int
    activation: str
    dtype: str = "fp32"
    gated: bool = True
    content: str = "normal"
    halves: bool = False
    gap: int = 0
    shift: int = 0
    again: bool = False
    in_place: bool = False


COLUMNS = (1, 7, 33, 64, 100, 1024 + 3)

_ALL = [
    Glu(rows, cols, activation, dtype, *rest)
    for activation in reference.ACTIVATIONS
    for dtype in DTYPES
    for rows, cols, *rest in (
        *((2, cols) for cols in COLUMNS),
        (1, 100, False, "normal", False, 3, 1, True),
        (3, 36, True, "normal", True, 0, 0, True),
        (3, 50, False, "wide", False, 7),
        (3, 129, True, "wide", False, 5, 3, True, True),
        (2, 70, True, "tiny", True, 0, 1),
        (2, 64, False, "tiny"),
        (2, 64, True, "normal", False, 0, 0, True, True),
        (4, 33, True, "special", True),
        (0, 33, True, "normal", False, 0, 0, True),
    )
]

CASES: dict[str, Glu] = {"-".join(map(str, vars(case).values())): case for case in _ALL}
assert len(CASES) == len(_ALL)

INF, NAN = float("inf"), float("nan")
SPECIAL = (
    *(0.0, -0.0, 1e-7, -1e-7, 15.0, -15.0, 87.0, -87.0, 88.5, -88.5, 89.0, -89.0, 103.0, -103.0),
    *(110.0, -110.0, 1e3, -1e3, 6e4, -6e4, 1e30, -1e30, NAN),
)


def check(case: Glu, kernels: GluKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    generator = torch.Generator().manual_seed(case.rows + case.cols)
    dtype, shape = DTYPES[case.dtype], (case.rows, case.cols)
    gate = _gate(case, generator).to(dtype)
    up = torch.randn(shape, generator=generator) if case.gated else None
    if up is not None:
        up = (up if case.content != "special" else up.abs().clamp(0.25, 0.9)).to(dtype)
    wrong = _check_forward(case, kernels, device, gate, up)
    if case.content == "special":
        return wrong
    dy = torch.randn(shape, generator=generator).to(dtype)
    return wrong + _check_backward(case, kernels, device, dy, gate, up)


def _gate(case: Glu, generator: torch.Generator) -> Tensor:
    shape = (case.rows, case.cols)
    if case.content == "wide":
        return torch.rand(shape, generator=generator) * 60 - 30
    x = 2 * torch.randn(shape, generator=generator)
    if case.content == "special":
        # torch's own gelu of an infinity depends on the strides
        ends = () if case.activation.startswith("gelu") else (INF, -INF)
        x.view(-1)[: len(SPECIAL + ends)] = torch.tensor(SPECIAL + ends)
    return x * 1e-5 if case.content == "tiny" else x


def _inputs(case: Glu, device: torch.device, *values: Tensor | None) -> list[Output | None]:
    """Each in memory of its own, or side by side in one."""
    shape = (case.rows, case.cols)
    found: list[Output | None] = []
    for x in values:
        place = None if x is None else Output(shape, x.dtype, device, case.gap, case.shift)
        if place is not None and x is not None:
            place.tensor.copy_(x)
        found.append(place)
    if case.halves:
        gate, up = found[-2:]
        assert gate is not None
        assert up is not None
        both = torch.cat((gate.tensor, up.tensor), 1)
        gate.tensor, up.tensor = both.chunk(2, 1)
    return found


def _check_forward(
    case: Glu, kernels: GluKernels, device: torch.device, gate: Tensor, up: Tensor | None
) -> str:
    gate_in, up_in = _inputs(case, device, gate, up)
    assert gate_in is not None
    out = Output((case.rows, case.cols), gate.dtype, device, case.gap, case.shift)
    kernels.glu(gate_in.tensor, up_in and up_in.tensor, case.activation, out.tensor)
    expected, truth = _outputs(case, gate, up)
    found = out.tensor.cpu()
    wrong = out.outside("out")
    if case.content == "special":
        same = (found == expected) | (found.isnan() & expected.isnan()) | expected.isfinite()
        if not same.all():
            at = gate[~same].tolist()
            wrong += f"out is {found[~same].tolist()}, not {expected[~same].tolist()} for {at}; "
        rest = expected.isfinite() & (gate.abs() < 1e3)  # the larger ones would hide these
        found, expected, truth = found[rest], expected[rest], truth[rest]
    return wrong + broken_rule("out", found, expected, truth)


def _outputs(case: Glu, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the reference, in the inputs' dtype and in float64."""
    wide = None if up is None else up.double()
    truth = reference.glu(gate.double(), wide, case.activation)
    return reference.glu(gate, up, case.activation), truth


def _check_backward(
    case: Glu,
    kernels: GluKernels,
    device: torch.device,
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
) -> str:
    inputs = _inputs(case, device, dy, gate, up)
    dy_in, gate_in, up_in = inputs
    assert dy_in is not None
    assert gate_in is not None
    if case.in_place:
        out, dgate, dup = inputs
    else:
        dgate, dup, out = (
            Output((case.rows, case.cols), dy.dtype, device, case.gap, case.shift)
            if there
            else None
            for there in (True, case.gated, case.again)
        )
    assert dgate is not None
    out = out if case.again else None
    kernels.glu_backward(
        dy_in.tensor,
        gate_in.tensor,
        up_in and up_in.tensor,
        case.activation,
        dgate.tensor,
        dup and dup.tensor,
        out and out.tensor,
    )
    expected = reference.glu_backward(dy, gate, up, case.activation)
    wide = None if up is None else up.double()
    truth = reference.glu_backward(dy.double(), gate.double(), wide, case.activation)
    wrong = broken_rule("dgate", dgate.tensor.cpu(), expected[0], truth[0]) + dgate.outside("dgate")
    if dup is not None and expected[1] is not None and truth[1] is not None:
        wrong += broken_rule("dup", dup.tensor.cpu(), expected[1], truth[1]) + dup.outside("dup")
    if out is not None:
        wrong += broken_rule("out", out.tensor.cpu(), *_outputs(case, gate, up))
        wrong += out.outside("out")
    return wrong
