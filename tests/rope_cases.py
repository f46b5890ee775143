"""What every implementation of the rotary embedding must do: the error rule, with the reference in
float64 as the truth, on inputs and outputs of the layouts that models have, in place too.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from error_rule import broken_rule
from stored_weights import DTYPES, Output
from torch import Tensor

from pyft.reference import rope as reference


class RopeKernels(Protocol):
    """The function of ``pyft.native`` and ``pyft.kernels.rope``."""

    def rope(
        self,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inverse: bool,
        q_out: Tensor,
        k_out: Tensor | None,
    ) -> None:
        """q, k [B, H, S, D] -> q_out, k_out."""


@dataclass(frozen=True)
class Rope:
    """q of ``heads[0]`` and k of ``heads[1]`` heads (0: none) of ``dim`` elements, of which
    ``turned`` turn. ``layout``: the order of dimensions in memory; rows lie ``gap`` further apart
    than they need be. ``tables``: a row for each "token", each token of a "batch", or "positions"
    in a table.
    """

    batch: int
    heads: tuple[int, int]
    seq: int
    dim: int
    turned: int
    dtype: str = "fp32"
    tables: str = "token"
    table_dtype: str = ""  # as dtype
    interleaved: bool = False
    inverse: bool = False
    layout: str = "bshd"
    gap: int = 0
    shift: int = 0
    in_place: bool = False


_BASES = (
    Rope(1, (1, 0), 1, 2, 2),
    Rope(2, (3, 1), 5, 16, 16, tables="batch", gap=3),
    Rope(2, (2, 2), 3, 80, 32, layout="bhsd", inverse=True),
    Rope(1, (2, 1), 7, 14, 14, layout="bhsd", gap=5, shift=1),
    Rope(2, (4, 2), 6, 128, 128, tables="positions", table_dtype="fp32"),
    Rope(3, (2, 1), 4, 66, 50, table_dtype="fp32", in_place=True, gap=6),
    Rope(1, (2, 0), 9, 64, 64, inverse=True, in_place=True, tables="positions", layout="bhsd"),
    Rope(1, (1, 1), 2, 300, 300, tables="batch", shift=1),
    Rope(2, (1, 1), 19, 24, 20, tables="positions", inverse=True, layout="bhsd"),
    Rope(0, (2, 1), 4, 16, 16),
    Rope(2, (2, 1), 0, 16, 16),
    Rope(1, (2, 1), 3, 16, 0),
)
_ALL = [
    replace(base, dtype=dtype, interleaved=interleaved)
    for base in _BASES
    for dtype in DTYPES
    for interleaved in (False, True)
]

CASES: dict[str, Rope] = {
    "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in vars(c).values()): c
    for c in _ALL
}
assert len(CASES) == len(_ALL)
POSITIONS = 23  # rows of a table that positions point into


def check(case: Rope, kernels: RopeKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    generator = torch.Generator().manual_seed(case.batch + case.dim)
    q, k = (
        torch.randn(case.batch, heads, case.seq, case.dim, generator=generator).to(
            DTYPES[case.dtype]
        )
        for heads in case.heads
    )
    cos, sin, positions = _tables(case, generator)
    q_in, k_in = _placed(case, q, device), _placed(case, k, device)
    q_out, k_out = q_in, k_in
    if not case.in_place:
        q_out, k_out = _fresh(case, case.heads[0], device), _fresh(case, case.heads[1], device)
    has_k = case.heads[1] > 0
    kernels.rope(
        q_in[1],
        k_in[1] if has_k else None,
        _spread(cos, device),
        _spread(sin, device),
        None if positions is None else positions.t().contiguous().t().to(device),
        case.interleaved,
        case.inverse,
        q_out[1],
        k_out[1] if has_k else None,
    )
    turn = -sin if case.inverse else sin
    expected = reference.rope(q, k, cos, turn, positions, case.interleaved)
    truth = reference.rope(
        q.double(), k.double(), cos.double(), turn.double(), positions, case.interleaved
    )
    wrong = ""
    for name, (memory, view), got, want in zip("qk", (q_out, k_out), expected, truth, strict=True):
        assert got is not None
        assert want is not None
        found = view.cpu()
        wrong += broken_rule(name, found, got, want) + memory.outside(name)
        if not torch.equal(found[..., case.turned :], got[..., case.turned :]):
            wrong += f"{name}: what does not turn is not what it was; "
    return wrong


def _tables(case: Rope, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    half = case.turned // 2
    shape = {
        "token": (1, case.seq, half),
        "batch": (case.batch, case.seq, half),
        "positions": (POSITIONS, half),
    }[case.tables]
    angles = torch.rand(shape, generator=generator) * 6.3
    dtype = DTYPES[case.table_dtype or case.dtype]
    positions = None
    if case.tables == "positions":
        positions = torch.randint(0, POSITIONS, (case.batch, case.seq), generator=generator)
    return angles.cos().to(dtype), angles.sin().to(dtype), positions


def _spread(table: Tensor, device: torch.device) -> Tensor:
    """The same values among NaN: models give halves of a table of cos, cos."""
    wide = torch.full((*table.shape[:-1], 2 * table.shape[-1]), torch.nan, dtype=table.dtype)
    wide[..., : table.shape[-1]] = table
    return wide.to(device)[..., : table.shape[-1]]


def _fresh(case: Rope, heads: int, device: torch.device) -> tuple[Output, Tensor]:
    """Memory full of NaN and its view [B, H, S, D]."""
    tokens, dtype = case.batch * case.seq, DTYPES[case.dtype]
    if case.layout == "bhsd":
        memory = Output((tokens * heads, case.dim), dtype, device, case.gap, case.shift)
        stride = case.dim + case.gap
        strides = (heads * case.seq * stride, case.seq * stride, stride, 1)
    else:
        memory = Output((tokens, heads * case.dim), dtype, device, case.gap, case.shift)
        stride = heads * case.dim + case.gap
        strides = (case.seq * stride, case.dim, stride, 1)
    shape = (case.batch, heads, case.seq, case.dim)
    return memory, memory.tensor.as_strided(shape, strides)


def _placed(case: Rope, x: Tensor, device: torch.device) -> tuple[Output, Tensor]:
    """x in memory of the case's layout."""
    memory, view = _fresh(case, x.shape[1], device)
    view.copy_(x)
    return memory, view
