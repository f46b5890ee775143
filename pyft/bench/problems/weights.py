"""Random inputs that several ops share: a weight as a model has it, and the same one quantized."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import pyft
from pyft.bench import peers
from pyft.bench.problem import DTYPES, Case, relative_error
from pyft.quantized import QuantizedTensor

PLAIN = "plain"  # in place of a format: the weight as it is


def random(shape: tuple[int, ...], case: Case, device: torch.device, name: str) -> Tensor:
    """Standard normal values of the case's dtype; the same ones for the same case and name."""
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(f"{name} {shape} {case.dtype}".encode()))
    return torch.randn(shape, generator=generator, dtype=DTYPES[case.dtype], device=device)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight [N, K] with standard deviation K**-0.5, as it is used and decoded by the reference.

    ``used`` is the quantized weight, or ``plain`` itself where there is no format. What peers make
    of the same weight is made once, when it is first asked for.
    """

    plain: Tensor
    used: Tensor | QuantizedTensor
    decoded: Tensor
    format: str

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight where it is quantized."""
        assert isinstance(self.used, QuantizedTensor)
        return self.used

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight in the form it is used."""
        used = self.used
        return used.stored_bytes if isinstance(used, QuantizedTensor) else used.nbytes

    @property
    def quantization_error(self) -> float:
        """What the format costs: ``||decoded - plain|| / ||plain||``."""
        return relative_error(self.decoded, self.plain)

    @cached_property
    def bitsandbytes(self) -> peers.Bnb4bit:
        """The weight as bitsandbytes packs it."""
        return peers.Bnb4bit(self.plain, self.format)

    @cached_property
    def linear(self) -> torch.nn.Module:
        """The frozen linear under PEFT's layers: torch's, or bitsandbytes' if it is quantized."""
        if self.format == PLAIN:
            return peers.torch_linear(self.plain)
        return peers.bnb_linear(self.plain, self.format)

    @cached_property
    def torchao(self) -> Any:
        """The weight as torchao's NF4 tensor."""
        return peers.torchao_nf4(self.plain)


def weight(case: Case, device: torch.device) -> Weight:
    """The weight of a case; cases with the same one share it."""
    return _weight((case.sizes["N"], case.sizes["K"]), case.dtype, case.format, device)


def weights(
    shapes: Mapping[str, tuple[int, int]], case: Case, device: torch.device
) -> dict[str, Weight]:
    """Several [N, K] by name, each of its own values; the last ones asked for are kept."""
    return _weights(tuple(shapes.items()), case.dtype, case.format, device)


@lru_cache(maxsize=4)
def _weight(shape: tuple[int, int], dtype: str, format: str, device: torch.device) -> Weight:
    return _make(shape, dtype, format, device)


@lru_cache(maxsize=1)
def _weights(
    shapes: tuple[tuple[str, tuple[int, int]], ...], dtype: str, format: str, device: torch.device
) -> dict[str, Weight]:
    return {name: _make(shape, dtype, format, device, name) for name, shape in shapes}


def _make(
    shape: tuple[int, int], dtype: str, format: str, device: torch.device, name: str = ""
) -> Weight:
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    plain = torch.randn(shape, generator=generator, dtype=DTYPES[dtype], device=device)
    plain *= shape[1] ** -0.5
    if format == PLAIN:
        return Weight(plain, plain, plain, format)
    with pyft.backend("reference"):
        quantized = pyft.quantize(plain, format)
        return Weight(plain, quantized, pyft.dequantize(quantized), format)
