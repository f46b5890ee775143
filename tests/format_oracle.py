"""Every quantized format in numpy, from its publication and the rules that ``pyft.formats`` states.

Nothing of pyft runs here. A value goes to its nearest neighbour, ties by the format's own rule; the
midpoint two neighbours are told apart by is their fp32 mean.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# QLoRA (Dettmers et al., 2023), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' FP4, twelfths; its table has no negative zero.
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
# OCP Microscaling Formats 1.0, E2M1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e4m3(code: int) -> float:
    """The value of an FP8 E4M3 byte (Micikevicius et al., 2022, table 1)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


@cache
def dynamic_map(signed: bool) -> Floats:
    """0, 1 and seven decades, each the centres of equal parts of [0.1, 1] times 10**(i - 6): 2**i
    of them for each sign, or 2**(i + 1) without a sign.
    """
    values = [np.float32(0), np.float32(1)]
    first = np.float32(0.1)
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        step = float((np.float32(1) - first) / np.float32(n))
        exact = [float(first) + step * j if 2 * j < n else 1 - step * (n - j) for j in range(n)]
        edges = np.array([first, *exact[1:], 1.0], dtype=np.float32)
        scaled = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*scaled, *-scaled] if signed else [*scaled]
    return np.sort(np.array(values, dtype=np.float32))


@dataclass(frozen=True)
class Coding:
    """A format: what each code is worth, which are written, and how scales are made."""

    bits: int
    values: Floats
    ties: str
    top: float = 1.0
    unused: tuple[int, ...] = ()
    e8m0: bool = False
    zero_points: bool = False

    @property
    def zero_code(self) -> int:
        return int(np.flatnonzero(self.values == 0)[0])


def _fp32(values: Iterable[float]) -> Floats:
    return np.array([*values], dtype=np.float32)


FORMATS = {
    "nf4": Coding(4, _fp32(NF4), "down"),
    "fp4": Coding(4, _fp32(FP4) / np.float32(12), "zero"),
    "int4": Coding(4, _fp32(range(-8, 8)), "even", 7.5),
    "int4_zp": Coding(4, _fp32(range(16)), "even", 15.0, zero_points=True),
    "int8": Coding(
        8, _fp32((i if i < 128 else i - 256) / 127 for i in range(256)), "even", unused=(128,)
    ),
    "fp8_e4m3": Coding(8, _fp32(map(e4m3, range(256))), "even", 448.0, unused=(0x7F, 0xFF)),
    "mxfp4": Coding(4, _fp32(E2M1), "even", 4.0, e8m0=True),
}
SCALES = Coding(8, dynamic_map(signed=True), "down")


@dataclass(frozen=True)
class Stored:
    """What a quantized weight stores."""

    packed: Bytes
    scales: Floats | Bytes
    zeros: Bytes | None = None
    nested: Floats | None = None
    offset: np.float32 | None = None

    def parts(self) -> list[NDArray[np.generic]]:
        found = (self.packed, self.scales, self.zeros, self.nested, self.offset)
        return [np.asarray(part) for part in found if part is not None]


def nearest(x: Floats, coding: Coding) -> Bytes:
    """The code of each element of x, scaled already; a NaN's is the lowest value's."""
    used = [code for code in range(len(coding.values)) if code not in coding.unused]
    by_value = {float(coding.values[code]): code for code in reversed(used)}  # -0 and 0 are one
    values = np.array(sorted(by_value), dtype=np.float32)
    codes = np.array([by_value[float(value)] for value in values])
    middle = (values[:-1] + values[1:]) / np.float32(2)
    level = np.searchsorted(middle, x, side="left")  # of a tie: the lower neighbour
    tie = np.append(middle, np.nan).astype(np.float32)[level] == x
    up = {
        "down": np.zeros(x.shape, dtype=bool),
        "zero": x < 0,
        "even": codes[level] % 2 == 1,
    }[coding.ties]
    level = np.where(np.isnan(x), 0, level + (tie & up))
    found = codes[level]
    zeros = [code for code in used if coding.values[code] == 0]
    negative_zero = (values[level] == 0) & (x < 0)
    return np.where(negative_zero, zeros[-1], found).astype(np.uint8)


def encode(x: Floats, coding: Coding, block: int) -> tuple[Bytes, Floats | Bytes, Bytes | None]:
    """Codes of each element, the scale and zero point of each block."""
    blocks = np.pad(x, (0, -x.size % block)).reshape(-1, block)
    missing = np.isnan(blocks).any(axis=1)
    with np.errstate(all="ignore"):
        low, high = blocks.min(axis=1, initial=0), blocks.max(axis=1, initial=0)
        span = high - low if coding.zero_points else np.abs(blocks).max(axis=1, initial=0)
        scale = np.where(missing, np.nan, span / np.float32(coding.top)).astype(np.float32)
        scales: Floats | Bytes = scale
        if coding.e8m0:
            exponent = np.where(np.isfinite(scale), np.frexp(scale)[1] - 1, 128)
            exponent = np.where(scale == 0, -127, np.maximum(exponent, -127))
            scales = (exponent + 127).astype(np.uint8)
            scale = e8m0(scales)
        zero = np.zeros_like(scale)
        if coding.zero_points:
            zero = np.rint(-low / scale)
            zero = np.where(np.isfinite(zero) & ~missing, zero.clip(0, 2**coding.bits - 1), 0)
            zero = zero.astype(np.float32)
        codes = nearest(blocks / scale[:, None] + zero[:, None], coding)
    codes[scale == 0] = coding.zero_code
    return (
        codes.reshape(-1)[: x.size],
        scales,
        zero.astype(np.uint8) if coding.zero_points else None,
    )


def e8m0(codes: Bytes) -> Floats:
    """Powers of two; 255 is NaN."""
    powers = np.ldexp(1.0, codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.nan, powers).astype(np.float32)


def pack(codes: Bytes, coding: Coding) -> Bytes:
    """Two 4-bit codes a byte, the first in the high nibble; an odd last one is followed by 0's."""
    if coding.bits == 8:
        return codes
    if codes.size % 2:
        codes = np.append(codes, np.uint8(coding.zero_code))
    return (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)


def quantize(name: str, x: Floats, block: int, double_quant: bool) -> Stored:
    """Flat fp32 [n] in the format ``name``."""
    coding = FORMATS[name]
    codes, scales, zeros = encode(x, coding, block)
    packed = pack(codes, coding)
    if not double_quant:
        return Stored(packed, scales, zeros)
    finite = bool(np.isfinite(scales).all())
    total = math.fsum(scales.tolist()) if finite else float(scales.sum())
    with np.errstate(all="ignore"):
        offset = np.float32(total / max(scales.size, 1))
        centred = (scales - offset).astype(np.float32)
    nested_codes, nested, _ = encode(centred, SCALES, 256)
    return Stored(packed, nested_codes, zeros, nested.astype(np.float32), offset)


def scales_of(stored: Stored, coding: Coding) -> Floats:
    """The scale of each block as it will be used."""
    if coding.e8m0:
        return e8m0(stored.scales.astype(np.uint8))
    if stored.nested is None or stored.offset is None:
        return stored.scales.astype(np.float32)
    with np.errstate(all="ignore"):
        scale = np.repeat(stored.nested, 256)[: stored.scales.size]
        scaled = SCALES.values[stored.scales.astype(np.uint8)] * scale
        return (scaled + stored.offset).astype(np.float32)


def dequantize(name: str, stored: Stored, n: int, block: int) -> Floats:
    """fp32 [n], before it is rounded to another dtype."""
    coding = FORMATS[name]
    codes = stored.packed
    if coding.bits == 4:
        codes = np.stack((codes >> 4, codes & 15), axis=1).reshape(-1)
    with np.errstate(all="ignore"):
        values = coding.values[codes[:n]]
        if stored.zeros is not None:
            values = values - np.repeat(stored.zeros, block)[:n].astype(np.float32)
        return (values * np.repeat(scales_of(stored, coding), block)[:n]).astype(np.float32)


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """The bits of x rounded to nearest even; 0x7FC0 for NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    kept, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (kept & 1 == 1))
    return np.where(np.isnan(x), 0x7FC0, kept + up).astype(np.uint16)
