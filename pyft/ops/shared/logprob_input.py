"""What the losses over log-probabilities are given, checked. No value of a tensor is looked at."""

from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from pyft.errors import UsageError


def divisor(op: str, items: float | Tensor | None, counts: Tensor) -> Tensor | float:
    """How many tokens a sum is divided by: num_items_in_batch or those that count, at least 1."""
    if items is None:
        return counts.sum().clamp(min=1)
    if isinstance(items, Tensor):
        if items.numel() != 1:
            raise UsageError(f"{op}: num_items_in_batch is {tuple(items.shape)}; pass one number")
        return items.reshape(()).to(counts.device).clamp(min=1)
    check_number(op, "num_items_in_batch", items, 0)
    return max(1, items)


def tensors(op: str, form: str, **given: Any) -> list[Tensor]:
    """In fp32 or float64, all of one shape, with the dimensions of ``form``, as "[B] or [B, S]"."""
    found: list[Tensor] = []
    dtype = torch.float32
    dims = [len(one.strip("[]").replace(",", " ").split()) for one in form.split(" or ")]
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(f"{op}: {name} is {what}; pass a floating tensor {form}")
        if x.dim() not in dims:
            raise UsageError(f"{op}: {name} is {tuple(x.shape)}; need {form}")
        if found:
            check_like(op, name, x, found[0])
        found.append(x)
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in found]


def counting(op: str, mask: Tensor, like: Tensor) -> Tensor:
    """A mask as bool."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(f"{op}: mask is {what}; pass bool, or integers 0 and 1")
    check_like(op, "mask", mask, like)
    return mask != 0


def check_like(op: str, name: str, x: Tensor, like: Tensor, dims: int | None = None) -> None:
    """On the same device and of the same shape, or the first ``dims`` dimensions of it."""
    if dims != 0 and x.shape != like.shape[:dims]:
        raise UsageError(
            f"{op}: {name} is {tuple(x.shape)}; need {tuple(like.shape[:dims])}, like the others"
        )
    if x.device != like.device:
        raise UsageError(f"{op}: {name} is on {x.device}, others on {like.device}; move one")


def check_number(
    op: str, name: str, value: Any, low: float, high: float = inf, above: bool = False
) -> None:
    """From low to high, or above low."""
    number = isinstance(value, int | float) and isfinite(value)
    if number and low <= value <= high and not (above and value == low):
        return
    need = f"above {low}" if above else f"of at least {low}" if high == inf else f"{low} to {high}"
    raise UsageError(f"{op}: {name} is {value}; need a number {need}")


def check_name(op: str, name: str, names: tuple[str, ...]) -> None:
    """One of the names of a loss."""
    if name not in names:
        raise UsageError(f"{op}: loss_type {name!r} is not one of {', '.join(names)}")
