"""The LoRA linear over a plain or quantized weight.

    y = x Wᵀ + bias + scale drop(x) Aᵀ Bᵀ
    x [M, K]   W [N, K]   A [R, K]   B [N, R]   y [M, N]

The equations, the backward's too, are those of ``pyft.ops.shared.projection`` for one projection;
``pyft.ops.shared.group`` says what is saved.
Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

import torch
from torch import Tensor

from pyft.backend import chosen, implementation
from pyft.errors import UsageError
from pyft.ops.dropout import Dropout, as_seed, check_probability
from pyft.ops.shared.group import Group, NormInput, checked_norm_input
from pyft.ops.shared.projection import Projection
from pyft.ops.shared.rows import as_rows
from pyft.quantized import QuantizedTensor

_lora_linear = Group("lora_linear", 1)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_input: NormInput | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale drop(x) Aᵀ Bᵀ, forward and backward, without keeping W, the mask or
    drop(x).

    Args:
        x: [..., K], any floating dtype, any strides, any number of rows, none included.
        weight: [N, K], a tensor of x's dtype or a QuantizedTensor of any dtype.
        lora_a: [R, K], or None (with lora_b) for the bare linear.
        lora_b: [N, R]. Adapters and bias of another dtype are cast to x's; their gradients come
            back in their own.
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: [N] or None.
        dropout_p: probability of dropping an input of the adapter, 0 <= p < 1.
        seed: of the dropout mask, see ``pyft.dropout``; the same seed gives the same mask on every
            backend.
        norm_input: what x is the RMSNorm of, so that x need not be kept: ``pyft.NormInput``.

    Returns:
        [..., N] of x's dtype. Inside autocast everything is cast to autocast's dtype first.

    Raises:
        UsageError: shapes or dtypes that do not fit, a backend asked for by name that cannot run.
    """
    x, cast = entering(x)
    projection = as_projection("lora_linear", x, weight, bias, lora_a, lora_b, scale, cast)
    check_probability("lora_linear", dropout_p)
    norm_input = checked_norm_input("lora_linear", x, norm_input, cast, projection.rank)
    drawn = as_seed(seed) if dropout_p > 0 and lora_a is not None else None
    name = chosen()
    if name == "reference":
        dense, a, b, bias = reference_arguments(projection, x)
        mask_seed = 0 if drawn is None else int(drawn)
        reference = implementation("lora_linear", "reference").lora_linear
        plain: Tensor = reference(x, dense, a, b, projection.scale, bias, dropout_p, mask_seed)
        return plain
    drop = Dropout(drawn, dropout_p)
    (y,) = _lora_linear(as_rows(x), [projection], norm_input, drop, name)
    return y.view(*x.shape[:-1], projection.out_features)


def entering(x: Tensor) -> tuple[Tensor, bool]:
    """x as it is, or inside autocast in autocast's dtype, and whether weights are to follow."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type)), True
    return x, False


def as_projection(
    op: str,
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    cast: bool,
    name: str = "x",
) -> Projection:
    """The checked arguments as an op takes them; ``cast``: a dense weight takes x's dtype. ``name``
    is what the caller knows x by.
    """
    if not isinstance(weight, Tensor) or not isinstance(scale, (int, float)):
        kinds = f"{type(weight).__name__} and {type(scale).__name__}"
        raise UsageError(f"{op}: weight and scale are {kinds}; pass a tensor and a number")
    if cast and not isinstance(weight, QuantizedTensor):
        weight = weight.to(x.dtype)
    _check(op, x, weight, lora_a, lora_b, bias, name)
    lora_a, lora_b, bias = (None if t is None else t.to(x.dtype) for t in (lora_a, lora_b, bias))
    adapter = (lora_a, lora_b, bias)
    n = weight.shape[0]
    if isinstance(weight, QuantizedTensor):
        coding = (weight.format.name, weight.block_size)
        return Projection(None, weight.parts(), *adapter, *coding, n, float(scale))
    return Projection(weight, [], *adapter, "", 0, n, float(scale))


def reference_arguments(
    p: Projection, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A projection's dense weight, lora_a, lora_b and bias."""
    if p.weight is not None:
        return p.weight, p.lora_a, p.lora_b, p.bias
    shape = (p.out_features, x.shape[-1])
    q = QuantizedTensor(p.stored, p.format, p.block_size, shape, x.dtype)
    return q.dequantize(), p.lora_a, p.lora_b, p.bias


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    name: str,
) -> None:
    n, k = weight.shape if weight.dim() == 2 else (0, -1)
    if x.dim() < 1 or x.shape[-1] != k:
        raise UsageError(
            f"{op}: {name} {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; "
            "need [..., K] and [N, K]"
        )
    if not x.is_floating_point():
        raise UsageError(f"{op}: {name} is {x.dtype}; pass a floating tensor")
    if not isinstance(weight, QuantizedTensor) and weight.dtype != x.dtype:
        raise UsageError(
            f"{op}: {name} is {x.dtype} and weight is {weight.dtype}; cast one of them"
        )
    if (lora_a is None) != (lora_b is None):
        raise UsageError(f"{op}: lora_a and lora_b go together; pass both or neither")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0] if lora_a.dim() == 2 else -1
        if lora_a.shape != (r, k) or lora_b.shape != (n, r):
            raise UsageError(
                f"{op}: lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} "
                f"do not fit weight {(n, k)}; need [R, {k}] and [{n}, R]"
            )
    for what, tensor in (
        ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias),
    ):  # fmt: skip
        if tensor is not None and not tensor.is_floating_point():
            raise UsageError(f"{op}: {what} is {tensor.dtype}; pass a floating tensor")
        if tensor is not None and tensor.device != x.device:
            raise UsageError(
                f"{op}: {name} is on {x.device} and {what} on {tensor.device}; move one of them"
            )
    if bias is not None and bias.shape != (n,):
        raise UsageError(f"{op}: bias {tuple(bias.shape)} does not fit weight {(n, k)}; need [{n}]")
