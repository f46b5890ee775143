"""q, k and v: three LoRA linears of one input, see ``pyft.ops.shared.projection``; x is read once
for all three adapters, and their input gradients accumulate into one tensor.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyft.backend import chosen, implementation
from pyft.errors import UsageError
from pyft.ops.dropout import Dropout, as_seed, check_probability
from pyft.ops.lora_linear import as_projection, entering, reference_arguments
from pyft.ops.shared.group import Group, NormInput, checked_norm_input
from pyft.ops.shared.projection import Projection
from pyft.ops.shared.rows import as_rows

Given = Sequence[Any]  # (weight, bias, lora_a, lora_b, scale)

_lora_qkv = Group("lora_qkv", 3)


def lora_qkv(
    x: Tensor,
    q_proj: Given,
    k_proj: Given,
    v_proj: Given,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_input: NormInput | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x, each with its own adapter or none.

    Args:
        x: [..., K], any floating dtype, any strides.
        q_proj, k_proj, v_proj: (weight, bias, lora_a, lora_b, scale), each as ``lora_linear`` takes
            them; ranks and numbers of rows may differ.
        dropout_p, seed: one mask for all three, see ``pyft.dropout``.
        norm_input: what x is the RMSNorm of, so that x need not be kept: ``pyft.NormInput``.

    Returns:
        [..., Nq], [..., Nk] and [..., Nv] of x's dtype.

    Raises:
        UsageError: shapes or dtypes that do not fit, a backend asked for by name that cannot run.
    """
    x, cast = entering(x)
    given = zip(("q_proj", "k_proj", "v_proj"), (q_proj, k_proj, v_proj), strict=True)
    projections = [given_projection(f"lora_qkv: {what}", x, p, cast) for what, p in given]
    check_probability("lora_qkv", dropout_p)
    norm_input = checked_norm_input(
        "lora_qkv", x, norm_input, cast, sum(p.rank for p in projections)
    )
    drawn = as_seed(seed) if dropout_p > 0 else None
    if chosen() == "reference":
        reference = implementation("lora_qkv", "reference").lora_qkv
        plain = [reference_projection(p, x) for p in projections]
        q, k, v = reference(x, plain, dropout_p, 0 if drawn is None else int(drawn))
        return q, k, v
    drop = Dropout(drawn, dropout_p)
    q, k, v = (
        y.view(*x.shape[:-1], y.shape[1])
        for y in _lora_qkv(as_rows(x), projections, norm_input, drop, chosen())
    )
    return q, k, v


def given_projection(op: str, x: Tensor, given: Given, cast: bool) -> Projection:
    """(weight, bias, lora_a, lora_b, scale), checked."""
    if not isinstance(given, (tuple, list)) or len(given) != 5:
        raise UsageError(f"{op} must be (weight, bias, lora_a, lora_b, scale)")
    weight, bias, lora_a, lora_b, scale = given
    return as_projection(op, x, weight, bias, lora_a, lora_b, scale, cast)


def reference_projection(p: Projection, x: Tensor) -> tuple[Any, ...]:
    """A checked projection as the reference takes it."""
    weight, lora_a, lora_b, bias = reference_arguments(p, x)
    return weight, bias, lora_a, lora_b, p.scale
