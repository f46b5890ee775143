"""The right answer of an op with gradients: plain torch in the op's dtype, and in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyft.bench.problem import rows_checked


def truths(
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    dys: Sequence[Tensor],
    by_rows: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``close`` takes: outputs, then gradients of ``inputs``, whole and in their own dtype,
    and the ``rows_checked`` of each in float64.

    Args:
        plain: computes in the dtype of what it is given.
        inputs: of ``plain``, which returns one tensor or several.
        dys: the gradients of those.
        by_rows: a row of any of them depends on that row of the others alone, so that no other need
            be computed in float64.
    """
    references = _run(plain, inputs, dys)
    if by_rows:
        inputs, dys = ([t[_rows(t)] for t in tensors] for tensors in (inputs, dys))
    wide = _run(plain, *([t.double() for t in tensors] for tensors in (inputs, dys)))
    return references, wide if by_rows else [part[_rows(part)] for part in wide]


def part_of(variant: str, outputs: int) -> slice:
    """Which of ``outputs`` outputs and the gradients after them a variant answers with."""
    parts = {"forward": slice(outputs), "backward": slice(outputs, None)}
    return parts.get(variant, slice(None))


def _run(
    plain: Callable[..., Any], inputs: Sequence[Tensor], dys: Sequence[Tensor]
) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in inputs]
    found = plain(*leaves)
    ys = (found,) if isinstance(found, Tensor) else found
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def _rows(part: Tensor) -> Tensor:
    return rows_checked(len(part)).to(part.device)
