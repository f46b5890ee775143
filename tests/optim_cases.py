"""What every implementation of the optimizer step must do, bit for bit, by the reference.

An implementation is anything with ``optim`` and ``OPTIM_ALIGN`` as in ``pyft.native``. A check
returns what is wrong as text, "" when nothing is.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyft.ops.optim import (
    BLOCK,
    Rule,
    Tables,
    Work,
    adamw_rule,
    code_tables,
    lion_rule,
    sgd_rule,
    start_table,
)
from pyft.reference import optim as reference

CPU = torch.device("cpu")
GUARD = 48  # elements around each tensor that must stay as they were
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = (1, 255, 256, 257, 4095, 4096, 4097, 10000)
RULES = {
    "adamw": adamw_rule(3, 1e-2, (0.9, 0.999), 1e-8, 0.1, False),
    "adamw-max": adamw_rule(1, 1e-3, (0.8, 0.95), 1e-6, 0.0, True),
    "adamw-last": adamw_rule(1, 1e-3, (0.0, 0.0), 1e-8, 0.0, False),  # m = g, v = g g
    "lion": lion_rule(1e-2, (0.9, 0.99), 0.1, False),
    "lion-max": lion_rule(1e-3, (0.95, 0.98), 0.0, True),
    "sgd": sgd_rule(2, 0.1, 0.9, 0.2, 0.01, False, False),
    "sgd-nesterov-max": sgd_rule(1, 0.1, 0.9, 0.0, 0.0, True, True),
}


class Kernels(Protocol):
    """What ``pyft.native`` and ``pyft.kernels.optim`` have."""

    OPTIM_ALIGN: int

    def optim(
        self,
        table: Tensor,
        blocks: int,
        aligned: bool,
        on: Tensor,
        codes: Tensor,
        starts: Tensor,
        *rule: float,
    ) -> None:
        """One step of the tensors in ``table``."""


@dataclass(frozen=True)
class Case:
    """Tensors of ``sizes`` elements in one call; those in ``plain`` have fp32 states.

    ``shift`` elements put them at addresses that wide accesses cannot use.
    """

    rule: str
    dtype: str = "fp32"
    content: str = "normal"
    sizes: tuple[int, ...] = SIZES
    coded: bool | None = None  # None: as the optimizers do, from 4096 elements
    shift: int = 0


_ALL = [
    *(Case(rule, dtype) for rule in RULES for dtype in DTYPES),
    *(Case("adamw", dtype, coded=coded) for dtype in DTYPES for coded in (False, True)),
    *(
        Case(rule, dtype, content, (600, 256, 4096 + 77), True)
        for rule in ("adamw", "lion", "sgd")
        for dtype in ("fp32", "bf16")
        for content in ("zeros", "nan", "inf", "huge", "tiny", "ties", "history")
    ),
    Case("adamw-last", "fp32", "ties", (4096, 1541), True),
    *(Case("adamw", dtype, sizes=(513, 700), coded=True, shift=1) for dtype in DTYPES),
    *(Case("sgd", dtype, sizes=(513, 700), coded=False, shift=3) for dtype in DTYPES),
    Case("adamw", "bf16", sizes=(1,) * 40 + (257, 3, 1000) * 5, coded=True),
]


def _name(case: Case) -> str:
    states = {None: "mixed", True: "coded", False: "plain"}[case.coded]
    sizes = f"{len(case.sizes)}x{max(case.sizes)}"
    return f"{case.rule}-{case.dtype}-{case.content}-{sizes}-{states}-{case.shift}"


CASES = {_name(case): case for case in _ALL}
assert len(CASES) == len(_ALL)


def check(case: Case, kernels: Kernels, device: torch.device) -> str:
    """What is wrong with one case: a tensor that differs, or memory written outside one."""
    generator = torch.Generator().manual_seed(len(case.sizes) + case.shift)
    rule = RULES[case.rule]
    tensors = [_tensors(case, rule, n, generator) for n in case.sizes]
    guarded = [[_Guarded(t, device, case.shift) for t in work] for work in tensors]
    works = [Work(*(g.tensor for g in work)) for work in guarded]
    table, blocks, aligned = Tables().get(None, works, kernels.OPTIM_ALIGN)
    maps = (code_tables(CPU).to(device), start_table(CPU).to(device))
    kernels.optim(table, blocks, aligned, works[0].param, *maps, *rule)
    for work in tensors:
        reference.update(*work, *rule)
    wrong = ""
    for n, work, expected in zip(case.sizes, guarded, tensors, strict=True):
        for name, found, truth in zip(Work._fields, work, expected, strict=True):
            wrong += found.differs(f"{name} of {n}", truth)
    return wrong


def _tensors(case: Case, rule: Rule, n: int, generator: torch.Generator) -> Work:
    """Parameter, gradient and states; what ``content`` names is in some blocks only."""
    dtype = DTYPES[case.dtype]
    param = torch.randn(n, generator=generator).to(dtype)
    grad = torch.randn(n, generator=generator)
    grad *= 10.0 ** torch.randint(-4, 2, (n,), generator=generator)
    coded = n >= 4096 if case.coded is None else case.coded
    states: list[Tensor | None] = []
    absmax: list[Tensor | None] = []
    blocks = -(-n // BLOCK)
    for moment in range(2):
        if moment == 1 and rule.algorithm != reference.ADAMW:
            states.append(None)
            absmax.append(None)
        elif coded:
            states.append(torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator))
            absmax.append(torch.rand(blocks, generator=generator) * 10.0 ** -(2 * moment))
        else:
            state = torch.randn(n, generator=generator)
            states.append(state.square() if moment else state)
            absmax.append(None)
    if case.content == "zeros":
        grad[: n // 2] = 0
    elif case.content in ("nan", "inf"):
        grad[n // 3], grad[n - 1] = float(case.content), -float(case.content)
    elif case.content == "huge":
        grad[n // 3] = 3e38  # finite, but not squared
    elif case.content == "tiny":
        grad *= 1e-38
    elif case.content == "ties":
        # where m = g, midpoints of the signed map and their neighbours; where v = g g, as near to
        # those of the unsigned one as roots come
        signed, unsigned = code_tables(CPU)[1, :255], code_tables(CPU)[3, :255].sqrt()
        ties = torch.cat([signed, unsigned])
        ties = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
        grad = ties.repeat(-(-n // len(ties)))[:n].clone()
        grad[::BLOCK] = 1.0
    if case.content in ("zeros", "tiny", "ties") and coded:
        for state, scale, zero_code in zip(states, absmax, (127, 0), strict=True):
            if state is not None and scale is not None:
                state.fill_(zero_code)
                scale.zero_()
    if case.content == "history" and coded and absmax[0] is not None:
        absmax[0][::2] = torch.tensor([0.0, 1e-40, 1e30]).repeat(blocks)[: len(absmax[0][::2])]
    grad = grad.to(dtype)
    return Work(param, grad, states[0], states[1], absmax[0], absmax[1])  # type: ignore[arg-type]


class _Guarded:
    """A copy of a tensor in the middle of other memory; None stays None."""

    def __init__(self, source: Tensor | None, device: torch.device, shift: int) -> None:
        self.tensor: Tensor | None = None
        if source is None:
            return
        n = source.numel()
        fill = 0xA5 if source.dtype == torch.uint8 else float("nan")
        self.buffer = torch.full((n + 2 * GUARD + 64,), fill, dtype=source.dtype, device=device)
        self.start = GUARD + shift
        self.tensor = self.buffer[self.start : self.start + n]
        self.tensor.copy_(source)
        self.expected = self.buffer.cpu().clone()

    def differs(self, name: str, expected: Tensor | None) -> str:
        if self.tensor is None or expected is None:
            return ""
        self.expected[self.start : self.start + expected.numel()] = expected
        wrong = ~_same_bits(self.buffer.cpu(), self.expected)
        if not wrong.any():
            return ""
        at = int(wrong.nonzero()[0])
        got, want = self.buffer.cpu()[at].item(), self.expected[at].item()
        return f"{name}[{at - self.start}] is {got!r}, not {want!r} ({int(wrong.sum())} differ); "


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a == b
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
