"""Launch configurations: one frozen dataclass per op, and the instance every GPU starts from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantize:
    """``tile`` elements at once, or one flat block where that is larger; a power of two."""

    tile: int = 2048
    num_warps: int = 8


@dataclass(frozen=True)
class Dequantize:
    """``tile`` elements of one row a program; a power of two, at least ``tiles.GROUP``."""

    tile: int = 2048
    num_warps: int = 8


@dataclass(frozen=True)
class QLinear:
    """The tile of y that one program gives, at most block_m (at least 16) by block_n, and how much
    of K it takes at once; powers of two.
    """

    block_m: int = 64
    block_n: int = 32
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Optim:
    """``rows`` blocks of 256 elements a program; a power of two."""

    rows: int = 4
    num_warps: int = 4


QUANTIZE = Quantize()
DEQUANTIZE = Dequantize()
QLINEAR = QLinear()
QLINEAR_NO_MATRIX_UNITS = QLinear(
    block_k=16, num_stages=2
)  # an operand of them is all in registers
OPTIM = Optim()
