"""Launch configurations: one frozen dataclass per op, and the instance every GPU starts from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantize:
    """``tile`` elements a program, or one block where that is larger; a power of two."""

    tile: int = 2048
    num_warps: int = 8


@dataclass(frozen=True)
class Dequantize:
    """``tile`` elements of one row a program; a power of two, at least ``tiles.GROUP``."""

    tile: int = 2048
    num_warps: int = 8


QUANTIZE = Quantize()
DEQUANTIZE = Dequantize()
