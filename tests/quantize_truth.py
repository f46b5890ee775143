"""Weights of all kinds, what they must be stored as and decode to by the oracle, and a way to run
each backend of this CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import format_oracle as oracle
import numpy as np
import pytest
import torch
from format_oracle import Stored
from shapes import QUANTIZED_DTYPES
from torch import Tensor

import pyft
from pyft import native
from pyft.formats import FORMATS, ROW, Format
from pyft.quantized import QuantizedTensor

BEST = native._cpu().best_isa()
ISAS = [name for name, level in native.ISAS.items() if level <= BEST]
RUNS = ["reference", *ISAS]


@contextmanager
def running(name: str) -> Iterator[None]:
    """On the reference, or in C++ with this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "reference":
            patch.setenv("PYFT_CPU_ISA", name)
        with pyft.backend("reference" if name == "reference" else "cpu"):
            yield


def bits(x: Tensor) -> Tensor:
    """The bits of x as integers, every NaN the same."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full((), float("nan"), dtype=x.dtype), x).contiguous()
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def stored_like(q: QuantizedTensor, expected: Stored) -> bool:
    """Whether q stores what the oracle does."""
    found, wanted = q.parts(), [torch.from_numpy(part) for part in expected.parts()]
    return len(found) == len(wanted) and all(map(same, found, wanted))


def rounded(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """fp32 rounded once, without torch."""
    with np.errstate(all="ignore"):
        if dtype == torch.float16:
            return torch.from_numpy(x.astype(np.float16))
    if dtype == torch.bfloat16:
        return torch.from_numpy(oracle.to_bf16(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def sizes_of(fmt: Format, shape: tuple[int, ...]) -> list[int | str]:
    """The block sizes a weight of this shape can have."""
    whole = shape[-1] * fmt.bits % 8 == 0
    return [*fmt.block_sizes, *(["row"] if not fmt.e8m0 and whole else [])]


class Case:
    """A weight, what must be stored for it, and what that decodes to: for all backends."""

    def __init__(self, name: str, w: Tensor, block_size: int | str, double_quant: bool) -> None:
        self.name, self.w, self.block_size, self.double_quant = name, w, block_size, double_quant
        row = w.shape[-1] if w.numel() else 256  # without elements any size will do
        self.size = row if block_size == "row" else int(block_size)
        values = w.float().flatten().numpy()
        self.stored = oracle.quantize(name, values, self.size, double_quant)
        decoded = oracle.dequantize(name, self.stored, w.numel(), self.size)
        self.decoded = [rounded(decoded, dtype).view(w.shape) for dtype in QUANTIZED_DTYPES]

    def __repr__(self) -> str:
        return f"{self.name} {tuple(self.w.shape)} {self.w.dtype} {self.block_size} " + (
            "double" if self.double_quant else "single"
        )

    def check(self) -> None:
        w, name = self.w, self.name
        q = pyft.quantize(w, name, self.block_size, self.double_quant)
        assert stored_like(q, self.stored), self
        found = (q.shape, q.dtype, q.block_size, q.format)
        assert found == (w.shape, w.dtype, self.size, FORMATS[name]), self
        for expected in self.decoded:
            assert same(pyft.dequantize(q, dtype=expected.dtype), expected), self


CONTENTS = (
    "normal", "zeros", "negative zeros", "nan", "inf", "subnormal", "smallest", "huge", "constant",
    "one per row", "positive", "negative", "far from zero",
)  # fmt: skip


def weight(shape: tuple[int, ...], content: str) -> Tensor:
    """fp32; half of the rows hold what ``content`` names, the others normal values."""
    x = torch.randn(shape)
    special = {
        "normal": x,
        "zeros": torch.zeros_like(x),
        "negative zeros": -torch.zeros_like(x),
        "nan": torch.where(torch.rand_like(x) < 0.02, torch.nan, x),
        "inf": torch.where(torch.rand_like(x) < 0.02, x.sign() * torch.inf, x),
        "subnormal": x * 1e-40,
        "smallest": torch.randint(-2, 3, shape).float() * 2.0**-149,
        "huge": x.clamp(-1, 1) * 3.4e38,
        "constant": torch.full_like(x, -0.3),
        "one per row": (torch.arange(x.numel()) % 97 == 5).float().view(shape),
        "positive": x.abs() + 0.1,
        "negative": -x.abs() - 0.1,
        "far from zero": x * 1e-3 + 5,
    }[content].clone()  # fmt: skip
    special[1::2] = x[1::2]
    return special


def default_size(fmt: Format) -> int | str:
    """The format's own block size, as a user writes it."""
    return "row" if fmt.block_size == ROW else fmt.block_size
