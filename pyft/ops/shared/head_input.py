"""What the losses over logits are given: checked, and as their ops take it."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import chosen, select
from pyft.errors import UsageError
from pyft.ops.lora_linear import as_projection, entering
from pyft.ops.shared.head import NO_HEAD, Call, LabelError, tiles_of
from pyft.ops.shared.rows import as_rows
from pyft.ops.shared.vocab_parallel import entering_shards, shard_of
from pyft.quantized import QuantizedTensor

Adapter = tuple[Tensor, Tensor, float]  # lora_a [R, D], lora_b [V, R] and their scale
_MIB = 1 << 20
_BUDGET = 64.0  # MiB
# Rows of logits that matmuls are fast with already: 1.07 of the time that all 1024 take
# (benchmarks/results/cpu-amd-epyc-avx2/loss-rows.json), and more take more memory, where no
# gradient of the head is a matmul over all of them. A GPU gets what the budget holds.
_ROWS = {"cpu": 256}


class Teacher(NamedTuple):
    """The head of a model to learn from: its input and its parameters; none gets a gradient.

    hidden [..., D'] of the student's leading shape, weight [V, D'] (or a QuantizedTensor), bias
    [V], lora (lora_a, lora_b, scale); logits are softcap tanh(logit_scale z / softcap).
    """

    hidden: Tensor
    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    lora: Adapter | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def as_call(
    op: str,
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: Adapter | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    shift: bool,
    budget: float | None,
    group: Any,
    class_weights: Tensor | None = None,
    teacher: Teacher | None = None,
) -> Call:
    """The checked arguments."""
    name = chosen()
    if not torch.compiler.is_compiling():
        select(op, hidden.device, name)  # raises where the backend asked for by name cannot run
    _check_labels(op, hidden, labels, shift)
    _check_rule(op, softcap, logit_scale)
    if budget is not None and not abs(budget) < inf:
        raise UsageError(f"{op}: budget is {budget}; need a number of MiB")
    if group is not None:
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise UsageError(
                f"{op}: group is {type(group).__name__}; pass a torch.distributed ProcessGroup"
            )
        _check_lora(op, lora)
        hidden, lora = entering_shards(hidden, lora, group)
    hidden, cast = entering(hidden)
    head = _head(op, hidden, weight, bias, lora, cast)
    first, total = shard_of(head.out_features, hidden.device, group)
    if class_weights is not None:
        class_weights = _class_weights(op, hidden, class_weights, total)
        class_weights = class_weights[first : first + head.out_features].contiguous()
    rows, taught = as_rows(hidden), NO_HEAD
    teacher_rows = None
    if teacher is not None:
        if not isinstance(teacher, Teacher):
            raise UsageError(f"{op}: teacher is {type(teacher).__name__}; pass a pyft.Teacher")
        if group is not None:
            raise UsageError(f"{op}: a teacher does not go with group; pass the whole head")
        _check_rule(f"{op}: teacher", teacher.softcap, teacher.logit_scale)
        teacher_rows, taught = _taught(op, hidden, head.out_features, teacher, cast)
    rule = (float(logit_scale), softcap)
    teacher_rule = (1.0, None) if teacher is None else (float(teacher.logit_scale), teacher.softcap)
    call = Call(
        rows, _flat_labels(labels, ignore_index, shift), class_weights, teacher_rows, head, taught,
        *rule, *teacher_rule, ignore_index, first, total, int((budget or 0) * _MIB), name,
    )  # fmt: skip
    row = head.out_features * hidden.element_size() * tiles_of(call)
    if budget is None:
        learns = torch.is_grad_enabled() and head.weight is not None and head.weight.requires_grad
        few = None if learns else _ROWS.get(hidden.device.type)
        most = int(_BUDGET * _MIB)  # whatever the length: under torch.compile it may be any
        return call._replace(budget=max(row, most if few is None else min(most, few * row)))
    if call.budget < row:
        need = -(-row * 100 // _MIB) / 100
        also = "" if teacher is None else " and one of the teacher's"
        raise UsageError(
            f"{op}: a budget of {budget:g} MiB does not hold one row of {head.out_features} "
            f"logits{also}; give at least {need:g}"
        )
    return call


def located(error: LabelError, op: str, labels: Tensor, shift: bool, total: int) -> UsageError:
    """The error with the label's place in the tensor the caller gave."""
    place: list[int] = []
    row = error.row + shift
    for size in reversed(labels.shape):
        place.insert(0, row % size)
        row //= size
    where = ", ".join(map(str, place))
    return UsageError(
        f"{op}: labels[{where}] is {error.label}; need 0 to {total - 1}, or the ignore_index"
    )


def _check_labels(op: str, hidden: Tensor, labels: Tensor, shift: bool) -> None:
    for what, given in (("hidden", hidden), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise UsageError(f"{op}: {what} is {type(given).__name__}; pass a tensor")
    if hidden.dim() < 1 or labels.shape != hidden.shape[:-1]:
        raise UsageError(
            f"{op}: hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not fit; "
            "need [..., D] and [...]"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"{op}: labels are {labels.dtype}; pass int64")
    if labels.device != hidden.device:
        raise UsageError(
            f"{op}: hidden is on {hidden.device} and labels on {labels.device}; move one of them"
        )
    if shift and labels.dim() < 1:
        raise UsageError(f"{op}: shift needs a dimension of tokens; labels have none")


def _check_rule(op: str, softcap: float | None, logit_scale: float) -> None:
    if softcap is not None and not 0 < softcap < inf:
        raise UsageError(f"{op}: softcap is {softcap}; need a number above 0, or None")
    if isinstance(logit_scale, Tensor):
        raise UsageError(f"{op}: logit_scale is a tensor; pass a number, it gets no gradient")
    if not abs(logit_scale) < inf:
        raise UsageError(f"{op}: logit_scale is {logit_scale}; need a finite number")


def _check_lora(op: str, lora: Adapter | None) -> None:
    if lora is not None and (not isinstance(lora, tuple) or len(lora) != 3):
        raise UsageError(f"{op}: lora is not (lora_a, lora_b, scale)")


def _head(
    op: str,
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None,
    lora: Adapter | None,
    cast: bool,
) -> Any:
    _check_lora(op, lora)
    lora_a, lora_b, scale = lora or (None, None, 1.0)
    p = as_projection(op, hidden, weight, bias, lora_a, lora_b, scale, cast, "hidden")
    if p.out_features == 0:
        raise UsageError(f"{op}: weight {tuple(weight.shape)} has no rows; need [V, D]")
    return p


def _taught(op: str, hidden: Tensor, columns: int, teacher: Teacher, cast: bool) -> tuple[Any, Any]:
    h = teacher.hidden.detach()
    if not h.is_floating_point():
        raise UsageError(f"{op}: the teacher's hidden is {h.dtype}; pass a floating tensor")
    if h.shape[:-1] != hidden.shape[:-1] or h.device != hidden.device:
        raise UsageError(
            f"{op}: hidden {tuple(hidden.shape)} on {hidden.device} and the teacher's "
            f"{tuple(h.shape)} on {h.device} do not fit; need one shape but for the last"
        )
    h = h.to(hidden.dtype)
    weight = teacher.weight.detach()
    if not isinstance(weight, QuantizedTensor):
        weight = weight.to(hidden.dtype)
    p = _head(f"{op}: teacher", h, weight, teacher.bias, teacher.lora, cast)
    if p.out_features != columns:
        raise UsageError(
            f"{op}: the teacher has {p.out_features} logits and the student {columns}; they must "
            "have one vocabulary"
        )
    detached = (None if x is None else x.detach() for x in (p.lora_a, p.lora_b, p.bias))
    lora_a, lora_b, bias = detached
    return as_rows(h), p._replace(lora_a=lora_a, lora_b=lora_b, bias=bias)


def _class_weights(op: str, hidden: Tensor, weights: Tensor, total: int) -> Tensor:
    if not isinstance(weights, Tensor):
        raise UsageError(f"{op}: class_weights are {type(weights).__name__}; pass a tensor")
    if weights.shape != (total,) or not weights.is_floating_point():
        raise UsageError(
            f"{op}: class_weights are {weights.dtype} {tuple(weights.shape)}; need floating "
            f"[{total}]"
        )
    if weights.requires_grad:
        raise UsageError(f"{op}: class_weights get no gradient; detach them")
    if weights.device != hidden.device:
        raise UsageError(
            f"{op}: hidden is on {hidden.device} and class_weights on {weights.device}; move one "
            "of them"
        )
    return weights.to(torch.promote_types(hidden.dtype, torch.float32))


def _flat_labels(labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """[N]; with ``shift`` each token has the next one's label, and the last none."""
    labels = labels.long()
    if shift and labels.numel():
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return labels.reshape(-1)
