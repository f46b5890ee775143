"""What every implementation of the matmul over a quantized weight must do: the error rule, with the
reference's decoded weight, rounded once to the input's dtype, as its weight.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from error_rule import allowed_error
from stored_weights import ALL_FORMATS, DTYPES, Output, shifted, stored_weight
from torch import Tensor

from pyft.formats import BLOCK_SIZES, MXFP4, ROW


class LinearKernels(Protocol):
    """The function of ``pyft.native`` and ``pyft.kernels.qlinear``."""

    def qlinear(
        self,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        nested: Tensor | None,
        offset: Tensor | None,
        codes: Tensor,
        scale_codes: Tensor | None,
        bits: int,
        shape: tuple[int, int],
        block_size: int,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        """x [M, K] and a weight of ``shape`` [N, K] -> out [M, N]."""


@dataclass(frozen=True)
class Linear:
    """x [m, k] in rows ``gap`` further apart than they need be, a weight [n, k], y likewise."""

    format: str
    m: int
    n: int
    k: int
    block_size: int = 64
    dtype: str = "bf16"
    nested: bool = False
    bias: bool = True
    gap: int = 0
    packed_shift: int = 0


def _cases() -> list[Linear]:
    cases: list[Linear] = []
    for name, fmt in ALL_FORMATS.items():
        cases += [Linear(name, 3, 9, 136, dtype=dtype) for dtype in DTYPES]
        cases += [Linear(name, 3, 9, 96, ROW, dtype) for dtype in DTYPES if not fmt.e8m0]
        cases += [Linear(name, m, 7, 200, nested=not fmt.e8m0) for m in (1, 2, 5, 17, 64)]
        cases += [Linear(name, m, 6, k, nested=not fmt.e8m0) for m, k in ((1, 4192), (3, 256))]
        cases += [Linear(name, 2, 5, k, bias=False, gap=3) for k in (1, 33, 100, 2121)]
    for dtype in DTYPES:
        cases += [Linear("nf4", 4, 5, 1072, size, dtype, True) for size in BLOCK_SIZES]
        cases += [Linear("int4_zp", 33, 6, 72, 32, dtype, True, gap=gap) for gap in (0, 8)]
        cases.append(Linear("nf4", 2, 6, 128, dtype=dtype, packed_shift=1))
        cases.append(Linear("int8", 9, 1, 1000, ROW, dtype))
        cases.append(Linear("nf4", 3, 4, 0, dtype=dtype))
    return cases


LINEAR_CASES: dict[str, Linear] = {
    "-".join(map(str, vars(case).values())): case for case in _cases()
}


def check_linear(case: Linear, kernels: LinearKernels, device: torch.device) -> str:
    """What is wrong with one case."""
    fmt, dtype = ALL_FORMATS[case.format], DTYPES[case.dtype]
    block_size = MXFP4.block_size if fmt.e8m0 else case.block_size
    weight = stored_weight(fmt, case.n, case.k, block_size, case.nested, sane=True)
    generator = torch.Generator().manual_seed(case.m + case.k)
    x = torch.randn(case.m, case.k + case.gap, generator=generator).to(dtype)[:, : case.k]
    pair = case.m > 1 and case.k > 1
    if pair:  # a row of two terms, whose sum shows that weights are rounded before they are added
        x[0] = 0
        x[0, case.k // 3], x[0, case.k - 1] = 1, -1
    bias = torch.randn(case.n, generator=generator).to(dtype) if case.bias else None
    decoded = weight.decode((0, case.n, 0, case.k), dtype)
    expected = torch.nn.functional.linear(x, decoded, bias)
    truth = torch.nn.functional.linear(
        x.double(), decoded.double(), None if bias is None else bias.double()
    )
    storage = torch.full((case.m, case.k + case.gap), torch.nan, dtype=dtype, device=device)
    on_device = shifted(storage, case.gap)[:, : case.k]
    on_device.copy_(x)
    out = Output((case.m, case.n), dtype, device, case.gap)
    kernels.qlinear(
        on_device,
        *weight.arguments(device, case.packed_shift),
        None if bias is None else bias.to(device),
        out.tensor,
    )
    found = out.tensor.cpu()
    if not found.isfinite().all():
        return f"y is not finite in {int((~found.isfinite()).sum())} of {found.numel()} places; "
    if pair:
        exact = (decoded.float() * x[0].float()).sum(dim=1)
        exact = exact if bias is None else exact + bias.float()
        if not torch.equal(found[0], exact.to(dtype)):
            return f"y[0] is {found[0].tolist()}, not {exact.to(dtype).tolist()}; "
    error, allowed = float((found.double() - truth).abs().max()), allowed_error(expected, truth)
    wrong = f"error {error:.3e}, allowed {allowed:.3e}; " if error > allowed else ""
    return wrong + out.outside("y")
