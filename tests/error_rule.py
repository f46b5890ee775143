"""The rule every kernel is held to:

    max|kernel - truth| <= 2 max|reference in the kernel's dtype - truth| + a few ulp

(ulp of the largest value) with the reference in float64 as the truth. It cannot be widened for
one test.
"""

import torch
from torch import Tensor

ULPS = 4


def allowed_error(reference: Tensor, truth: Tensor) -> float:
    """What the rule allows, given the reference in the kernel's dtype."""
    ulp = torch.finfo(reference.dtype).eps * _largest(truth)
    return 2 * _largest(reference.double() - truth) + ULPS * ulp


def check_error(name: str, kernel: Tensor, reference: Tensor, truth: Tensor) -> None:
    """Assert the rule, and that shape and dtype are the reference's."""
    assert truth.dtype == torch.float64
    assert kernel.dtype == reference.dtype, name
    assert kernel.shape == reference.shape == truth.shape, name
    assert kernel.isfinite().all(), f"{name} is not finite"
    error, allowed = _largest(kernel.double() - truth), allowed_error(reference, truth)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def broken_rule(name: str, kernel: Tensor, reference: Tensor, truth: Tensor) -> str:
    """What ``check_error`` finds wrong, as text, "" when nothing is."""
    try:
        check_error(name, kernel, reference, truth)
    except AssertionError as error:
        return f"{error}; "
    return ""


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
