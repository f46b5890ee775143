"""Dropout from a seed: y = x * keep / (1 - p), keep a function of (seed, element index).

The mask is never stored: the backward and a recomputation draw it again from the seed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import (
    PREFERENCE,
    backend,
    chosen,
    device_guard,
    implementation,
    obstacle,
    select,
)
from pyft.errors import UsageError
from pyft.op import Op


def draw_seed() -> Tensor:
    """A seed from torch's CPU generator, int64 []: reproducible under torch.manual_seed and in a
    recomputation.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)


def apply_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The forward without autograd, on the best backend there is for x."""
    # A composed op forced onto a backend without a dropout kernel draws the reference's same mask.
    name = next(
        n
        for n in (*PREFERENCE.get(x.device.type, ()), "reference")
        if obstacle("dropout", n) is None
    )
    reference = implementation("dropout", "reference")
    if name == "reference" or x.dtype == torch.float64:
        dropped: Tensor = reference.dropout(x, p, int(seed))
        return dropped
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels = implementation("dropout", name)
    with device_guard(x):
        kernels.dropout(x.contiguous(), int(seed), reference.threshold(p), 1.0 / (1.0 - p), out)
    return out


class Dropout(NamedTuple):
    """Dropout as fused ops pass it on; no seed: none."""

    seed: Tensor | None
    p: float

    def __call__(self, x: Tensor) -> Tensor:
        """x dropped."""
        return x if self.seed is None else apply_dropout(x, self.p, self.seed)

    def as_numbers(self) -> tuple[int, float, int]:
        """Threshold, scale of what is kept, and seed, as kernels take them; threshold 0: none."""
        if self.seed is None:
            return 0, 1.0, 0
        threshold = implementation("dropout", "reference").threshold(self.p)
        return threshold, 1.0 / (1.0 - self.p), int(self.seed)


NO_DROPOUT = Dropout(None, 0.0)


def _forward(x: Tensor, p: float, seed: Tensor, name: str) -> Tensor:
    with backend(name):
        select("dropout", x.device)  # raises where the backend asked for by name cannot run
    return apply_dropout(x, p, seed)


def _fake(x: Tensor, p: float, seed: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.p, ctx.name = inputs[1], inputs[3]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return _dropout(dy, ctx.p, ctx.saved_tensors[0], ctx.name), None, None, None


_dropout = Op("dropout", _forward, _fake, _save, _backward)


def dropout(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Zero each element of x with probability p, divide the others by 1 - p.

    Args:
        x: any shape and floating dtype.
        p: 0 <= p < 1.
        seed: an integer (its low 64 bits) or an int64 tensor [] on the CPU; None draws one from
            torch's CPU generator.

    Raises:
        UsageError: p outside [0, 1), x not floating, a backend asked for by name that has no kernel
            for x's dtype.

    Source: the random words are Philox4x32-10, Salmon et al. (2011).
    """
    check_probability("dropout", p)
    if not x.is_floating_point():
        raise UsageError(f"dropout: x is {x.dtype}; pass a floating tensor")
    if x.dtype == torch.float64 and chosen() not in ("auto", "reference"):
        raise UsageError(
            f"backend {chosen()!r} cannot run dropout in {x.dtype}; use reference or auto"
        )
    if p == 0.0:
        return x
    if chosen() == "reference":
        dropped: Tensor = implementation("dropout", "reference").dropout(x, p, int(as_seed(seed)))
        return dropped
    y: Tensor = _dropout(x, p, as_seed(seed), chosen())
    return y


def check_probability(op: str, p: float) -> None:
    """Raise UsageError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise UsageError(f"{op}: dropout probability {p} is outside [0, 1)")


def as_seed(seed: int | Tensor | None) -> Tensor:
    """The seed as an int64 tensor [] on the CPU, drawn where there is none."""
    if seed is None:
        return draw_seed()
    if isinstance(seed, Tensor):
        return seed
    return torch.tensor(
        (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64
    )  # the same 64 bits, signed
