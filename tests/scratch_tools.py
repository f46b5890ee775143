"""What tests of the scratch need: a fresh one, its buffer, and what is decoded into it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pyft
from pyft import scratch
from pyft.ops import qlinear
from pyft.ops.qlinear import FUSED_ROWS
from pyft.quantized import QuantizedTensor
from pyft.scratch import Slab, limit_scratch

ROWS = max(FUSED_ROWS["cpu"].values()) + 6  # so many that the weight is decoded into the scratch


@pytest.fixture(autouse=True)
def fresh_scratch() -> Iterator[None]:
    """As in a process that has decoded nothing yet."""
    scratch._of_thread.buffer = scratch._Buffer()
    before = limit_scratch(None)
    yield
    limit_scratch(before)
    scratch._of_thread.buffer = scratch._Buffer()


def buffer() -> scratch._Buffer:
    """This thread's."""
    return scratch._of_thread.buffer


def weight(rows: int = 48, cols: int = 128, name: str = "nf4") -> QuantizedTensor:
    return pyft.quantize(torch.randn(rows, cols), name)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Slab]]:
    """The slabs that are decoded inside the block."""
    decodes: list[Slab] = []
    decode = qlinear.dequantize_slab

    def counted(*arguments: object) -> None:
        decodes.append(arguments[4])  # type: ignore[arg-type]
        decode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(qlinear, "dequantize_slab", counted)
        yield decodes
