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


@dataclass(frozen=True)
class Norm:
    """``tile`` elements a program: whole rows where a row has no more than ``longest``, otherwise
    a part of one row at a time. ``elements`` a thread forward, ``elements_backward`` in the
    backward, where a program has many rows, one after another; powers of two.
    """

    tile: int = 2048
    longest: int = 8192
    elements: int = 32
    elements_backward: int = 8


@dataclass(frozen=True)
class Rope:
    """About ``tile`` elements a program: some heads of one token; a power of two."""

    tile: int = 2048
    num_warps: int = 4


@dataclass(frozen=True)
class Glu:
    """``tile`` elements of one row a program; a power of two."""

    tile: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class Logits:
    """``tile`` columns of one row a program, ``gradient_tile`` in the gradient; powers of two."""

    tile: int = 8192
    num_warps: int = 8
    gradient_tile: int = 4096
    gradient_warps: int = 8


@dataclass(frozen=True)
class LoraMatmul:
    """The tile of the output, how much of K and of the rank is taken at once, and how many tiles
    down follow one another before the next to the right; powers of two, blocks at least 16.

    persistent: one program a multiprocessor, which goes through many tiles. tma: x and w through
    tensor descriptors where their addresses and strides are multiples of 16 bytes.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    block_r: int = 64
    group_m: int = 8
    persistent: bool = False
    tma: bool = False
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class Skinny:
    """Rows and columns of the large input, and how much of the rank, taken at once; ``programs`` to
    have at least, for which the sum is split into parts; powers of two, blocks at least 16.
    """

    block_m: int = 64
    block_k: int = 64
    block_r: int = 128
    programs: int = 256
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Dropout:
    """``tile`` elements a program; a power of two, at least 4."""

    tile: int = 2048
    num_warps: int = 4


@dataclass(frozen=True)
class Tile:
    """Queries and keys at once, powers of two: of what a program goes through at least 16, of what
    it has 16 for matrix units and 8 without.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Attention:
    """Tiles of the forward and of the backward's passes: over blocks of keys, over blocks of
    queries (and for the gradient of a bias). fused: one launch does both, with the warps and stages
    of ``keys``. ``programs`` to have at least over blocks of keys, for which a group is split.
    """

    forward: Tile
    keys: Tile
    queries: Tile
    fused: bool = False
    programs: int = 128


@dataclass(frozen=True)
class AttentionDelta:
    """``tile`` elements a program; a power of two."""

    tile: int = 4096
    num_warps: int = 4


QUANTIZE = Quantize()
DEQUANTIZE = Dequantize()
QLINEAR = QLinear()
QLINEAR_NO_MATRIX_UNITS = QLinear(
    block_k=16, num_stages=2
)  # an operand of them is all in registers
OPTIM = Optim()
DROPOUT = Dropout()
NORM = Norm()
ROPE = Rope()
GLU = Glu()
LOGITS = Logits()
LORA_MATMUL = LoraMatmul()
LORA_MATMUL_TMA = LoraMatmul(block_n=256, block_r=16, tma=True)  # more of the rank would spill
LORA_MATMUL_PERSISTENT = LoraMatmul(persistent=True)
LORA_MATMUL_PERSISTENT_TMA = LoraMatmul(persistent=True, tma=True)
LORA_MATMUL_NO_MATRIX_UNITS = LoraMatmul(
    block_m=64, block_n=64, block_k=16, block_r=16, num_warps=4, num_stages=2
)
LORA_MATMUL_BY_MAJOR = {  # of the compute capability; others take LORA_MATMUL
    7: LORA_MATMUL_NO_MATRIX_UNITS,
    9: LORA_MATMUL_TMA,
    10: LORA_MATMUL_TMA,
}
PROJECT = Skinny()
REDUCE = Skinny(block_k=128, num_warps=8)
SKINNY_NO_MATRIX_UNITS = Skinny(block_m=32, block_k=32, block_r=32, num_stages=2)

ATTENTION_DELTA = AttentionDelta()
# NVIDIA's compute capabilities from which a class of GPUs begins: by matrix units, shared memory.
ATTENTION_CLASSES = {
    (7, 0): "no_matrix_units",  # Triton has none before 8.0
    (8, 0): "ampere",
    (8, 6): "small",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (12, 0): "small",
}
# class of GPUs, the first what all are in fp32 -> largest head dim -> tiles: no spills up to 128
ATTENTION: dict[str, dict[int, Attention]] = {
    "no_matrix_units": {
        64: Attention(Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(8, 16, 4, 1)),
        128: Attention(Tile(16, 16, 4, 1), Tile(16, 8, 8, 1), Tile(16, 16, 8, 1)),
        512: Attention(Tile(8, 16, 8, 1), Tile(16, 8, 8, 1), Tile(8, 16, 8, 1)),
    },
    "ampere": {
        64: Attention(Tile(128, 64, 8, 3), Tile(32, 128, 8), Tile(128, 64, 8), fused=True),
        128: Attention(Tile(128, 64, 8, 3), Tile(64, 64, 8), Tile(128, 32, 8), fused=True),
        256: Attention(Tile(64, 64, 8), Tile(32, 32, 8), Tile(64, 32, 8), fused=True),
        512: Attention(Tile(32, 32, 8), Tile(16, 16, 8), Tile(32, 16, 8), fused=True),
    },
    "small": {
        64: Attention(Tile(128, 64, 8), Tile(32, 64), Tile(64, 64), fused=True),
        128: Attention(Tile(128, 64, 8, 3), Tile(64, 64, 8), Tile(64, 64, 8), fused=True),
        256: Attention(Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8), fused=True),
        512: Attention(Tile(32, 16, 8, 1), Tile(16, 16, 8), Tile(16, 16, 8), fused=True),
    },
    "hopper": {
        64: Attention(Tile(128, 128, 8, 3), Tile(64, 128, 8), Tile(128, 128, 8), fused=True),
        128: Attention(Tile(128, 128, 8), Tile(32, 128, 8), Tile(128, 64, 8), fused=True),
        256: Attention(Tile(128, 64, 8), Tile(32, 32, 8), Tile(64, 32, 8), fused=True),
        512: Attention(Tile(32, 32, 8), Tile(16, 16, 8), Tile(32, 16, 8), fused=True),
    },
    "blackwell": {
        64: Attention(Tile(128, 128, 8, 3), Tile(64, 128, 8, 1), Tile(128, 64, 8)),
        128: Attention(Tile(128, 64, 8, 3), Tile(32, 128, 8, 1), Tile(128, 64, 8, 3)),
        256: Attention(Tile(64, 64, 8), Tile(32, 32, 8), Tile(64, 32, 8), fused=True),
        512: Attention(Tile(32, 32, 8), Tile(16, 16, 8), Tile(32, 16, 8), fused=True),
    },
    "amd": {
        64: Attention(Tile(128, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), fused=True),
        128: Attention(Tile(64, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), fused=True),
        256: Attention(Tile(64, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), fused=True),
        512: Attention(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), fused=True),
    },
}
