"""One step of an optimizer with 8-bit states, the specification.

Every product, sum, quotient and square root below is one fp32 operation rounded to nearest; the
order is part of the rule. g is the gradient times ``sign``, p the parameter, both widened to fp32.

    AdamW  m = beta1 m + rest1 g,  v = beta2 v + (rest2 g) g,  u = m / (sqrt(v) + eps)
    Lion   u = sgn(beta1 m + rest1 g),  m = beta2 m + rest2 g
    SGD    d = g + decay p,  m = beta1 m + rest1 d,  u = d + beta1 m (Nesterov) or m
    all    p = p keep - u step, rounded once to the parameter's dtype

A state of fp32 is kept as it is. An 8-bit state is coded in blocks of 256 elements: absmax[b] is
the largest magnitude of block b, the code of x how many midpoints of the map lie strictly below
x / absmax[b]; m has the signed dynamic map, v the unsigned one, and a v above 0 takes at least the
code after that of 0. A block all of zeros has the code of 0 and absmax 0.

A block of 256 elements in which any new state is infinite or NaN keeps its parameters and its
states: the step is skipped there.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019); Chen et al., Symbolic
Discovery of Optimization Algorithms (2023); Dettmers et al., 8-bit Optimizers via Block-wise
Quantization (2022).
"""

from functools import cache

import torch
from torch import Tensor

from pyft.formats import dynamic_map

BLOCK = 256
ADAMW, LION, SGD = range(3)


def update(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    first_absmax: Tensor | None,
    second_absmax: Tensor | None,
    algorithm: int,
    nesterov: bool,
    sign: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    keep: float,
    decay: float,
    step: float,
    eps: float,
) -> None:
    """Update flat ``param`` [n] and its states in place; ``grad`` [n] is only read.

    ``first`` is m and ``second`` v (AdamW only), fp32 [n], or uint8 [n] with their absmax, fp32
    [ceil(n / 256)]. The scalars are fp32 numbers.
    """
    p, g = _blocks(param.float()), _blocks(grad.float()) * sign
    m = _decode(first, first_absmax, signed=True)
    v = torch.zeros_like(m) if second is None else _decode(second, second_absmax, signed=False)
    if algorithm == ADAMW:
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * rest2) * g
        u = m / (v.double().sqrt().float() + eps)  # torch's fp32 root may be one bit off
    elif algorithm == LION:
        u = (m * beta1 + g * rest1).sign()
        m = m * beta2 + g * rest2
    else:
        d = g + p * decay
        m = m * beta1 + d * rest1
        u = d + m * beta1 if nesterov else m
    p = p * keep - u * step
    finite = (m.isfinite() & v.isfinite()).all(dim=1)
    _store(param, p, finite)
    _encode(m, first, first_absmax, finite, signed=True)
    if second is not None:
        _encode(v, second, second_absmax, finite, signed=False)


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    return torch.tensor(dynamic_map(signed), dtype=torch.float32, device=device)


def _blocks(x: Tensor) -> Tensor:
    """x [n] as [ceil(n / 256), 256], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _store(into: Tensor, blocks: Tensor, finite: Tensor) -> None:
    """Write the blocks named by ``finite`` to the flat tensor they came from."""
    written = finite.repeat_interleave(BLOCK)[: into.numel()]
    into.copy_(torch.where(written, blocks.flatten()[: into.numel()].to(into.dtype), into))


def _decode(state: Tensor, absmax: Tensor | None, signed: bool) -> Tensor:
    """The state as fp32 [blocks, 256]."""
    if absmax is None:
        return _blocks(state)
    return _blocks(_map(signed, state.device)[state.long()]) * absmax[:, None]


def _encode(x: Tensor, state: Tensor, absmax: Tensor | None, finite: Tensor, signed: bool) -> None:
    """Write blocks x [blocks, 256] to the state they came from."""
    if absmax is None:
        _store(state, x, finite)
        return
    codes = _map(signed, x.device)
    midpoints = (codes[:-1] + codes[1:]) / 2
    scale = x.abs().amax(dim=1)
    code = torch.searchsorted(midpoints, x / scale[:, None])  # how many lie strictly below
    if not signed:
        code = torch.maximum(code, (x > 0).long())
    code[scale == 0] = int((codes == 0).nonzero())
    _store(state, code.to(torch.uint8), finite)
    absmax.copy_(torch.where(finite, scale, absmax))
