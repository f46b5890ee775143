"""What the loss takes of a tile of logits, and its gradient in the tile's place.

    u = softcap tanh(scale z / softcap), or scale z       z [M, V] as the head gives it

    statistics    log-sum-exp, the label's logit and other sums of each row
    gradient_     z becomes dz, given what each of those sums weighs

The equations are those of ``pyft.reference.logits``. Two reads and a write of the tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyft.backend import device_guard, implementation, launcher


class Taught(NamedTuple):
    """A teacher's logits [M, V] and their log-sum-exp."""

    z: Tensor
    lse: Tensor
    scale: float
    softcap: float | None


class Tile(NamedTuple):
    """Logits and what is known of them."""

    z: Tensor
    labels: Tensor  # int64 [M]; one outside [0, V) names no column
    class_weights: Tensor | None  # fp32 [V]
    scale: float
    softcap: float | None
    taught: Taught | None = None

    def as_kernels_take(self) -> tuple[object, ...]:
        """One after another, the teacher's too."""
        return (*self[:5], *(self.taught or (None, None, 1.0, None)))


class Wanted(NamedTuple):
    """Which sums are wanted besides lse and target; ``top`` brings argmax."""

    smooth: bool = False
    mean: bool = False
    cross: bool = False
    top: bool = False


class Statistics(NamedTuple):
    """Of each row, fp32 (float64 of float64); those that were not wanted are empty."""

    lse: Tensor
    target: Tensor
    smooth: Tensor
    mean: Tensor
    cross: Tensor
    top: Tensor
    argmax: Tensor  # int64


class Weights(NamedTuple):
    """The gradient of each sum, [M] like it; None: 0."""

    lse: Tensor
    target: Tensor
    smooth: Tensor | None = None
    mean: Tensor | None = None
    cross: Tensor | None = None


class Filter(NamedTuple):
    """Where to note columns, uint8 [V]: 1 where p >= threshold in some row, or a row's label is."""

    threshold: float
    kept: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over logits are in."""
    return torch.promote_types(dtype, torch.float32)


def empty_statistics(z: Tensor, rows: int, wanted: Wanted) -> Statistics:
    """For so many rows of logits like z."""
    sizes = (rows, rows, *(rows if want else 0 for want in wanted))
    sums = [z.new_empty(size, dtype=wide(z.dtype)) for size in sizes]
    return Statistics(*sums, z.new_empty(sizes[-1], dtype=torch.int64))  # type: ignore[call-arg]


def statistics(tile: Tile, wanted: Wanted, name: str) -> Statistics:
    """The sums of each row of a tile."""
    z = tile.z
    kernels = launcher("logits", z, name)
    if kernels is None:
        reference = implementation("logits", "reference")
        teacher = tile.taught and reference.capped(tile.taught.z, *tile.taught[2:])
        found = reference.logit_statistics(*tile[:5], teacher)
        keep = (True, True, *wanted, wanted.top)
        return Statistics(
            *(x if want else x.new_empty(0) for x, want in zip(found, keep, strict=True))
        )
    into = empty_statistics(z, z.shape[0], wanted)
    if z.numel():
        given = (x if x.numel() else None for x in into)
        with device_guard(z):
            kernels.logit_statistics(tile.as_kernels_take(), *given)
    return into


def gradient_(
    tile: Tile,
    lse: Tensor,
    mean: Tensor | None,
    weights: Weights,
    name: str,
    filtered: Filter | None = None,
) -> None:
    """dz in the place of z; ``mean`` where ``weights`` has one."""
    z = tile.z
    kernels = launcher("logits", z, name)
    if kernels is None:
        reference = implementation("logits", "reference")
        teacher = tile.taught and reference.capped(tile.taught.z, *tile.taught[2:])
        if filtered is not None:
            p = (reference.capped(z, *tile[3:5]) - lse[:, None]).exp()
            filtered.kept[(p >= filtered.threshold).any(0)] = 1
            filtered.kept[tile.labels[(tile.labels >= 0) & (tile.labels < z.shape[1])]] = 1
        whole = None if tile.taught is None else tile.taught.lse
        z.copy_(reference.logit_gradient(*tile[:5], teacher, lse, mean, *weights, whole))
    elif z.numel():
        mean = None if weights.mean is None else mean
        threshold, kept = filtered or (0.0, None)
        sums = (weights.lse, weights.target, weights.smooth, weights.mean, weights.cross)
        with device_guard(z):
            kernels.logit_gradient(tile.as_kernels_take(), lse, mean, *sums, threshold, kept)
