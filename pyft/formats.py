"""Quantized formats as data: code book, block size, nested scales.

A 4-bit format stores a weight of shape [N, K] as n = N*K codes, flattened row by row:

    packed   uint8 [ceil(n/2)]         two codes a byte, the first element in the high nibble
    absmax   fp32  [ceil(n/block)]     largest magnitude of each block of consecutive elements

    encode   code = number of midpoints strictly below x / absmax; 0 for NaN, ``zero_code`` in an
             all-zero block
    decode   x = fp32(codes[code]) * fp32(absmax), rounded once to the output's dtype

With double quantization absmax itself is stored in 8 bits: its mean ``offset`` is taken off and
blocks of ``NESTED_BLOCK`` values are coded in the same way with the signed dynamic map.

Sources: NF4 and double quantization, Dettmers et al., QLoRA (2023); the dynamic map, Dettmers,
8-Bit Approximations for Parallelism in Deep Learning (2015).
"""

from dataclasses import dataclass
from functools import cache

import torch

NESTED_BLOCK = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Format:
    """One quantized format: ascending ``codes``; ``zero_code`` is the index of the code 0."""

    name: str
    bits: int
    codes: tuple[float, ...]
    zero_code: int
    block_size: int


NF4 = Format(
    name="nf4",
    bits=4,
    codes=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    zero_code=7,
    block_size=64,
)


def _signed_dynamic_map() -> tuple[float, ...]:
    """256 ascending codes in [-1, 1]: decades 1e-6 .. 1, each with twice the fractions of the last.

    Each edge is exact in fp64 and rounded once: torch.linspace itself gives other bits on a CPU
    without fused multiply-add.
    """
    codes = [0.0, 1.0]
    first = torch.tensor(0.1)
    for decade in range(7):
        steps = 2**decade
        step, i = ((1 - first) / steps).double(), torch.arange(steps + 1, dtype=torch.float64)
        edges = torch.where(
            i < (steps + 1) // 2, first.double() + step * i, 1 - step * (steps - i)
        ).float()
        fractions = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        codes += fractions.tolist() + (-fractions).tolist()
    return tuple(sorted(codes))


@cache
def absmax_format() -> Format:
    """The 8-bit format of nested absmax values: the signed dynamic map in blocks of 256."""
    codes = _signed_dynamic_map()
    return Format("dynamic8", 8, codes, codes.index(0.0), NESTED_BLOCK)


FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (NF4,)}


@cache
def code_table(fmt: Format, device: torch.device) -> torch.Tensor:
    """The codes as fp32 [2**bits] on ``device``."""
    return torch.tensor(fmt.codes, dtype=torch.float32, device=device)


@cache
def midpoint_table(fmt: Format, device: torch.device) -> torch.Tensor:
    """The thresholds between neighbouring codes as fp32 [2**bits - 1] on ``device``."""
    codes = torch.tensor(fmt.codes, dtype=torch.float32)
    return ((codes[:-1] + codes[1:]) / 2).to(device)


def nested_blocks(blocks: int) -> int:
    """How many nested absmax values ``blocks`` absmax values take."""
    return -(-blocks // NESTED_BLOCK)
