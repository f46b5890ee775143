"""NF4 with double quantization in numpy, from its papers and the layout in ``pyft.formats``.

Nothing of pyft runs here.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# QLoRA (Dettmers et al., 2023), appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip


@cache
def dynamic8() -> Floats:
    """The signed dynamic map: centres of 2**i intervals of [0.1, 1] times 10**(i - 6), 0, 1."""
    values = [np.float32(0), np.float32(1)]
    first = np.float32(0.1)
    for i in range(7):
        n = 2**i
        step = float((np.float32(1) - first) / np.float32(n))
        exact = [float(first) + step * j if 2 * j < n else 1 - step * (n - j) for j in range(n)]
        edges = np.array([first, *exact[1:], 1.0], dtype=np.float32)
        scaled = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*scaled, *-scaled]
    return np.sort(np.array(values, dtype=np.float32))


@dataclass(frozen=True)
class Stored:
    """What a quantized weight stores."""

    packed: Bytes
    absmax: NDArray[np.float32] | Bytes
    nested: Floats | None = None
    offset: np.float32 | None = None


def encode(x: Floats, table: Floats, zero: int, block: int) -> tuple[Bytes, Floats]:
    """Codes of each element and absmax of each block; NaN counts no midpoint below it."""
    middle = (table[:-1] + table[1:]) / np.float32(2)
    blocks = np.pad(x, (0, -x.size % block)).reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1, initial=0)  # NaN if any is
    with np.errstate(all="ignore"):
        scaled = blocks / absmax[:, None]
    codes = np.searchsorted(middle, scaled, side="left")  # midpoints strictly below
    codes[np.isnan(scaled)] = 0
    codes[absmax == 0] = zero
    return codes.reshape(-1)[: x.size].astype(np.uint8), absmax


def quantize(x: Floats, block: int, double_quant: bool) -> Stored:
    """Flat fp32 [n]; an odd n is followed by one more code, of the value 0."""
    codes, absmax = encode(x, NF4, 7, block)
    if x.size % 2:
        codes = np.append(codes, np.uint8(0 if np.isnan(absmax[-1]) else 7))
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    if not double_quant:
        return Stored(packed, absmax)
    total = math.fsum(absmax.tolist()) if np.isfinite(absmax).all() else float(absmax.sum())
    with np.errstate(all="ignore"):
        offset = np.float32(total / max(absmax.size, 1))
        centred = absmax - offset
    table = dynamic8()
    nested_codes, nested = encode(centred, table, int(np.flatnonzero(table == 0)[0]), 256)
    return Stored(packed, nested_codes, nested, offset)


def absmax_of(stored: Stored) -> Floats:
    """The absmax of each block as it will be used."""
    if stored.nested is None or stored.offset is None:
        return stored.absmax.astype(np.float32)
    with np.errstate(all="ignore"):
        scale = np.repeat(stored.nested, 256)[: stored.absmax.size]
        scaled = dynamic8()[stored.absmax] * scale
        return (scaled + stored.offset).astype(np.float32)


def dequantize(stored: Stored, n: int, block: int) -> Floats:
    """fp32 [n], before it is rounded to another dtype."""
    codes = np.stack((stored.packed >> 4, stored.packed & 15), axis=1).reshape(-1)[:n]
    with np.errstate(all="ignore"):
        return NF4[codes] * np.repeat(absmax_of(stored), block)[:n]


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """The bits of x rounded to nearest even; 0x7FC0 for NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    kept, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (kept & 1 == 1))
    return np.where(np.isnan(x), 0x7FC0, kept + up).astype(np.uint16)
