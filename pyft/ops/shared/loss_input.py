"""Checks of what only ``linear_cross_entropy`` is given."""

from typing import Any

import torch
from torch import Tensor

from pyft.errors import UsageError
from pyft.ops.shared.head import Call

REDUCTIONS = ("mean", "sum", "none")


def check_numbers(
    reduction: str, label_smoothing: float, z_loss: float, items: float | Tensor | None
) -> None:
    """Raise where an option is out of its range."""
    op = "linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise UsageError(f"{op}: reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"{op}: label_smoothing is {label_smoothing}; need 0 to 1")
    if not 0 <= z_loss < float("inf"):
        raise UsageError(f"{op}: z_loss is {z_loss}; need a number of at least 0")
    if items is not None and reduction != "mean":
        raise UsageError(
            f"{op}: num_items_in_batch is what a mean divides by; leave it out with "
            f"reduction={reduction!r}"
        )
    if isinstance(items, Tensor):
        if items.numel() != 1:
            raise UsageError(f"{op}: num_items_in_batch is {tuple(items.shape)}; pass one number")
    elif items is not None and not 0 < items < float("inf"):
        raise UsageError(f"{op}: num_items_in_batch is {items}; need a number above 0")


def checked_token_weights(hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor | None:
    """The weights of tokens, if they fit the labels."""
    op = "linear_cross_entropy"
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise UsageError(f"{op}: token_weights are {type(weights).__name__}; pass a tensor")
    if weights.shape != labels.shape or not weights.is_floating_point():
        raise UsageError(
            f"{op}: token_weights are {weights.dtype} {tuple(weights.shape)}; need floating "
            f"{tuple(labels.shape)}"
        )
    if weights.device != hidden.device:
        raise UsageError(
            f"{op}: hidden is on {hidden.device} and token_weights on {weights.device}; move one "
            "of them"
        )
    return weights


def threshold_of(
    call: Call,
    asked: bool | float,
    label_smoothing: float,
    group: Any,
    reduction: str,
    learned: bool,
) -> float:
    """The probability below which a column is left out; 0: none is."""
    op = "linear_cross_entropy"
    threshold = torch.finfo(call.hidden.dtype).eps / 32 if asked is True else float(asked)
    if not 0 <= threshold < 1:
        raise UsageError(f"{op}: gradient_filter is {asked}; need a probability below 1, or True")
    if threshold == 0:
        return 0.0
    if (
        learned
        or label_smoothing
        or group is not None
        or call.head.weight is None
        or reduction == "none"
    ):
        raise UsageError(
            f"{op}: gradient_filter does not go with label_smoothing, group, reduction='none', a "
            "quantized weight or token_weights that are learned; leave one of them out"
        )
    return threshold
