"""Quantized formats as data: codes, scales, zero points, packing.

A weight [rows, cols] is n = rows * cols elements in row order, in blocks of ``block_size``
consecutive ones: a power of two from 32 to 4096, or a row. It is stored as

    packed   uint8 [ceil(n * bits / 8)]   4 bits: two codes a byte, the first in the high nibble
    scales   fp32 [blocks], or uint8 [blocks] for e8m0 (2^(code - 127), 255 is NaN)
    zeros    uint8 [blocks], only in formats with zero points

    span     the block's largest magnitude; with zero points max(x, 0) - min(x, 0)
    scale    span / top; e8m0: the power of two at or below it, at least 2^-127
    zero     -min(x, 0) / scale, rounded to even, within the codes; 0 where that is not finite
    encode   level = number of thresholds strictly below x / scale + zero;  code = order[level]
             NaN takes level 0; where scale is 0 every element takes the code of 0
    decode   (codes[code] - zero) * scale in fp32, rounded once to the output's dtype

An odd last nibble holds the code of 0. All of it is fp32, division included. An infinity or NaN is
kept as far as a block can: its scale is not finite, so that the block decodes to NaN and infinities
(so does one whose span is beyond fp32), and with double quantization, whose offset is then not
finite either, the whole weight.

With double quantization fp32 scales are stored in 8 bits too: their mean ``offset`` is taken off
and the rest is quantized like a weight in blocks of 256 with the signed dynamic map
(``SCALE_FORMAT``); its own scales are called ``nested``.

Sources: NF4 and double quantization, Dettmers et al., QLoRA (2023); FP4 as bitsandbytes has it;
the dynamic map, Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (2015); integers
with zero points, Frantar et al., GPTQ (2022), Lin et al., AWQ (2023); row-wise int8, Dettmers et
al., LLM.int8() (2022); e4m3, Micikevicius et al., FP8 Formats for Deep Learning (2022); mxfp4, OCP
Microscaling Formats 1.0 (2023).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

NESTED_BLOCK = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROW = 0  # as a block size: one scale a row


@dataclass(frozen=True, eq=False)
class Format:
    """One quantized format.

    Attributes:
        codes: value of each of the 2**bits codes.
        ties: where a value midway between two neighbours goes: "down", toward "zero", or to the
            neighbour whose code is "even".
        unused: codes that are decoded and never written.
        top: what a block's span is divided by to give its scale.
        block_size: the default; ``ROW`` for a scale a row.
        block_sizes: what it can be, besides ``ROW``.
        e8m0: scales are powers of two in a byte.
        zero_points: each block has one.
        double_quant: whether scales are quantized unless told otherwise.
    """

    name: str
    bits: int
    codes: tuple[float, ...]
    ties: str
    unused: tuple[int, ...] = ()
    top: float = 1.0
    block_size: int = 64
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    e8m0: bool = False
    zero_points: bool = False
    double_quant: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def order(self) -> tuple[int, ...]:
        """The codes that are written, by ascending value; -0 comes before 0."""
        used = (code for code in range(2**self.bits) if code not in self.unused)
        return tuple(sorted(used, key=lambda code: (self.codes[code], code == 0)))

    @property
    def zero_code(self) -> int:
        """The code of 0, +0 where there are two."""
        return self.codes.index(0.0)


def dynamic_map(signed: bool) -> tuple[float, ...]:
    """256 ascending codes in [-1, 1] or [0, 1]: seven decades from 1e-6 up, each with twice the
    fractions of the one below; without a sign, twice as many in each.

    Each edge is exact in fp64 and rounded once: torch.linspace itself gives other bits on a CPU
    without fused multiply-add.
    """
    codes = [0.0, 1.0]
    first, one = np.float32(0.1), np.float32(1)
    for decade in range(7):
        steps = 2 ** (decade if signed else decade + 1)
        step, i = np.float64((one - first) / np.float32(steps)), np.arange(steps + 1)
        upward, downward = np.float64(first) + step * i, 1 - step * (steps - i)
        edges = np.where(i < (steps + 1) // 2, upward, downward).astype(np.float32)
        fractions = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        codes += fractions.tolist()
        if signed:
            codes += (-fractions).tolist()
    return tuple(sorted(codes))


def _minifloat(exponent_bits: int, mantissa_bits: int) -> Iterator[float]:
    """Values of a sign, exponent and mantissa read as IEEE 754 does, without infinities."""
    bias = 2 ** (exponent_bits - 1) - 1
    for code in range(2 ** (1 + exponent_bits + mantissa_bits)):
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        exponent = code >> mantissa_bits & (2**exponent_bits - 1)
        fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        leading = 1 if exponent else 0
        yield sign * (leading + fraction) * 2.0 ** (max(exponent, 1) - bias)


def _e4m3() -> tuple[float, ...]:
    codes = list(_minifloat(4, 3))
    codes[0x7F] = codes[0xFF] = float("nan")
    return tuple(codes)


def _fp32(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(np.array(list(values)).astype(np.float32).tolist())


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
    ties="down",
    double_quant=True,
)
FP4 = Format(
    "fp4",
    4,
    _fp32(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
    ties="zero",
    double_quant=True,
)
INT4 = Format(
    "int4", 4, _fp32(range(-8, 8)), ties="even", top=7.5, block_size=128
)  # all 16 codes, and no error above half a scale
INT4_ZP = Format(
    "int4_zp", 4, _fp32(range(16)), ties="even", top=15.0, block_size=128, zero_points=True
)
INT8 = Format(
    "int8",
    8,
    _fp32((code - 256 * (code > 127)) / 127 for code in range(256)),
    ties="even",
    unused=(128,),
    block_size=ROW,
)  # bytes are signed: code 255 is -1/127
FP8 = Format("fp8_e4m3", 8, _e4m3(), ties="even", unused=(0x7F, 0xFF), top=448.0, block_size=128)
MXFP4 = Format(
    "mxfp4", 4, tuple(_minifloat(2, 1)), ties="even", top=4.0, block_size=32, block_sizes=(32,),
    e8m0=True,
)  # fmt: skip

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (NF4, FP4, INT4, INT4_ZP, INT8, FP8, MXFP4)}

# How double quantization stores scales.
SCALE_FORMAT = Format("dynamic8", 8, dynamic_map(signed=True), ties="down", block_size=NESTED_BLOCK)


@cache
def code_table(fmt: Format, device: torch.device) -> torch.Tensor:
    """The codes as fp32 [2**bits] on ``device``."""
    return torch.tensor(fmt.codes, dtype=torch.float32, device=device)


@cache
def order_table(fmt: Format, device: torch.device) -> torch.Tensor:
    """The code of each level as uint8 [2**bits] on ``device``; padded with the last."""
    order = fmt.order + fmt.order[-1:] * (2**fmt.bits - len(fmt.order))
    return torch.tensor(order, dtype=torch.uint8, device=device)


@cache
def threshold_table(fmt: Format, device: torch.device) -> torch.Tensor:
    """The largest fp32 value of each level but the highest, fp32 [2**bits - 1]; padded with +inf.

    It is the midpoint between two neighbours, or the number just below where a tie goes up.
    """
    values = torch.tensor(
        [fmt.codes[code] for code in fmt.order], dtype=torch.float32, device="cpu"
    )
    middle = (values[:-1] + values[1:]) / 2
    below = torch.tensor(fmt.order[:-1], device="cpu")
    tie_goes_up = {
        "down": torch.zeros_like(middle, dtype=torch.bool),
        "zero": middle < 0,
        "even": below % 2 == 1,
    }[fmt.ties] | (values[:-1] == values[1:])
    lower = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    padding = middle.new_full((2**fmt.bits - 1 - len(middle),), torch.inf)
    return torch.cat([torch.where(tie_goes_up, lower, middle), padding]).to(device)


@cache
def e8m0_table(device: torch.device) -> torch.Tensor:
    """2^(code - 127) as fp32 [256] on ``device``; code 255 is NaN."""
    table = torch.exp2(torch.arange(-127, 129, dtype=torch.float64, device="cpu")).float()
    table[255] = torch.nan
    return table.to(device)


def blocks_of(numel: int, block_size: int) -> int:
    """How many blocks ``numel`` elements take."""
    return -(-numel // block_size)


def scale_offset(scales: torch.Tensor) -> torch.Tensor:
    """The mean of fp32 scales, summed in fp64 and rounded once: fp32 []."""
    total = scales.double().sum()  # divided by a tensor: by a number, a GPU takes its reciprocal
    return (total / torch.full_like(total, max(scales.numel(), 1))).float()
