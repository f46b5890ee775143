"""Shapes and dtypes that tests and benchmarks share.

M tokens, N out features, K in features, R rank.
"""

import torch

from pyft.bench.shapes import MODELS

# Of weights [N, K]: K below, at and off the block size, odd sizes, one element, none.
WEIGHT_SHAPES: tuple[tuple[int, int], ...] = (
    (3, 64),
    (5, 96),
    (7, 100),
    (2, 4304),
    (1, 4304),
    (33, 65),
    (13, 7),
    (1, 1),
    (1, 2),
    (0, 64),
    (5, 0),
)

# Of a linear [M, N, K, R]: the sizes of the kernels' tiles, one row, odd sizes, ranks 1 to 64.
LINEAR_SHAPES: tuple[tuple[int, int, int, int], ...] = (
    (16, 64, 64, 16),
    (1, 128, 96, 1),
    (9, 33, 100, 3),
    (17, 70, 257, 64),
)

# K of the linears of real models, 1B to 70B parameters.
REAL_COLUMNS = sorted({k for model in MODELS.values() for _, k in model.linears().values()})

RANKS = (1, 3, 16, 64)

QUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR_DTYPES = (*QUANTIZED_DTYPES, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, not ``torch.bfloat16``: for test ids and file names."""
    return str(dtype).removeprefix("torch.")
