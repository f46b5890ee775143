"""Log-probabilities of labels under a linear head, without its logits in memory.

    u = softcap tanh(scale (h Wᵀ + bias + s (h Aᵀ) Bᵀ) / softcap)      h [N, D]   W [V, D]
    logprob = u_y - lse    entropy = lse - Σ p_c u_c    kl = lse - lse_t - Σ q_c (u_c - t_c)

    dlse/du = p    du_y/du = [c = y]    dΣ p u/du = p (1 + u - Σ p u)    dkl/du = p - q

with t the teacher's u and q = softmax(t).

``pyft.ops.shared.head`` says how the logits are gone over, ``pyft.ops.logits`` what is taken of
them. Saved for the backward: the inputs, lse, and Σ p u where entropy was asked for; the logits are
multiplied again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import backend, implementation, select
from pyft.op import Op, Primitive, packed, plain, unpacked
from pyft.ops.logits import Statistics, Wanted, Weights, statistics, wide
from pyft.ops.lora_linear import reference_arguments
from pyft.ops.shared.head import (
    FLAT,
    SCHEMA,
    Call,
    LabelError,
    Wants,
    counted,
    over_rows,
    write_rows,
)
from pyft.ops.shared.head_gradients import Known, fake_gradients, gradients
from pyft.ops.shared.head_input import Adapter, Teacher, as_call, located
from pyft.ops.shared.vocab_parallel import merged
from pyft.quantized import QuantizedTensor

__all__ = ["Teacher", "TokenLogprobs", "head_gradients", "linear_logprobs", "token_statistics"]

_LEAVES = (0, 4, 6, 7, 8)  # hidden, weight, lora_a, lora_b, bias among the flat arguments


class TokenLogprobs(NamedTuple):
    """Of each token, fp32 (float64 of float64), of labels' shape; 0 where the label is ignored.

    argmax is int64 and -1 there; entropy is None unless asked for, kl without a teacher. All are
    differences of log-sum-exps and the like: exact to a few roundings of those.
    """

    logprob: Tensor
    lse: Tensor
    argmax: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Statistics of each row [N] and, with a teacher, its lse."""
    call, wanted = Call.of(arguments[:FLAT]), Wanted(*arguments[FLAT:])
    with backend(call.name):
        select("linear_logprobs", call.hidden.device)
        rows = counted(call)
        into = _empty(call, wanted)
        if rows.places is not None:
            for whole in into:
                whole.fill_(-1 if whole.dtype == torch.int64 else 0)
        for chunk in over_rows(call, rows):
            found: list[Tensor] = [*statistics(chunk.tile, wanted, call.name)]
            if chunk.tile.taught is not None:
                found.append(chunk.tile.taught.lse)
            for whole, part in zip(into, found, strict=False):
                if whole.numel():
                    write_rows(whole, part, rows.places, chunk.begin, chunk.end)
    return tuple(into)


def _empty(call: Call, wanted: Wanted) -> list[Tensor]:
    n, dtype = call.hidden.shape[0], wide(call.hidden.dtype)
    many = (n, n, *(n if want else 0 for want in wanted))
    sums = [call.hidden.new_empty(size, dtype=dtype) for size in many]
    argmax = call.hidden.new_empty(many[-1], dtype=torch.int64)
    of_teacher = 0 if call.teacher_hidden is None else n
    return [*sums, argmax, sums[0].new_empty(of_teacher)]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(Call.of(arguments[:FLAT]), Wanted(*arguments[FLAT:])))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    lse, _, _, mean, _, top, argmax, teacher_lse = output
    ctx.mark_non_differentiable(top, argmax, teacher_lse)
    ctx.needs = [inputs[i] is not None and inputs[i].requires_grad for i in _LEAVES]
    tensors, ctx.rest = packed(inputs)
    ctx.save_for_backward(lse, mean, teacher_lse, *tensors)


def _backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    lse, mean, teacher_lse, *tensors = ctx.saved_tensors
    arguments = unpacked(tensors, ctx.rest)
    # what was not asked for is empty, and so may be its gradient
    g_lse, g_target, g_smooth, g_mean, g_cross = (
        None if g is None or not g.numel() else g for g in given[:5]
    )
    zeros = torch.zeros_like(lse)
    weights = (zeros if g_lse is None else g_lse, zeros if g_target is None else g_target)
    kept = lse.new_empty(0, dtype=torch.uint8)
    found = head_gradients(
        *arguments[:FLAT], lse, mean if g_mean is not None else None,
        teacher_lse if teacher_lse.numel() else None, *weights, g_smooth, g_mean, g_cross,
        ctx.needs, kept,
    )  # fmt: skip
    into: list[Tensor | None] = [None] * len(arguments)
    for place, gradient, wanted in zip(_LEAVES, found, ctx.needs, strict=True):
        into[place] = gradient if wanted else None
    return tuple(into)


def _of(arguments: tuple[Any, ...]) -> tuple[Call, Known, Wants, Tensor]:
    lse, mean, teacher_lse, *weights, wants, kept = arguments[FLAT:]
    known = Known(lse, mean, teacher_lse, Weights(*weights))
    return Call.of(arguments[:FLAT]), known, Wants(*wants), kept


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    call, known, wants, kept = _of(arguments)
    with backend(call.name):
        return tuple(gradients(call, known, wants, kept))


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    call, _, wants, _ = _of(arguments)
    return tuple(fake_gradients(call, wants))


head_gradients = Primitive(
    "linear_logprobs_backward",
    _gradients,
    _fake_gradients,
    f"({SCHEMA}, Tensor lse, Tensor? mean, Tensor? teacher_lse, Tensor g_lse, Tensor g_target, "
    "Tensor? g_smooth, Tensor? g_mean, Tensor? g_cross, bool[] wants, Tensor kept) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_linear_logprobs = Op(
    "linear_logprobs",
    _forward,
    _fake,
    _save,
    _backward,
    f"({SCHEMA}, bool smooth, bool mean, bool cross, bool top) -> ({', '.join(['Tensor'] * 8)})",
)


def token_statistics(
    call: Call, wanted: Wanted, group: Any = None
) -> tuple[Statistics, Tensor | None]:
    """Differentiable sums of each row [N], those of all ranks of a group merged, and with a teacher
    its lse.
    """
    *sums, teacher_lse = _linear_logprobs(*call.flat(), *wanted)
    found = Statistics(*sums)
    if group is not None:
        counts = call.labels != call.ignore_index
        found = merged(found, call.first, group, counts)
    return found, None if call.teacher_hidden is None else teacher_lse


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    labels: Tensor,
    bias: Tensor | None = None,
    lora: Adapter | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    entropy: bool = False,
    teacher: Teacher | None = None,
    budget: float | None = None,
    group: Any = None,
) -> TokenLogprobs:
    """log softmax(logits)[label] of each token, and what else one looks at in logits, which are
    never in memory but for ``budget`` MiB of them.

    DPO, GRPO, distillation and others are made of it: ``pyft.losses``. With an adapter switched off
    (``lora=None``, or in a PEFT model ``disable_adapter()``) it gives the reference's without a
    second model.

    Args:
        hidden: [..., D], what the head is given; any floating dtype, any strides.
        weight: [V, D], a tensor of hidden's dtype or a QuantizedTensor.
        labels: int64 or int32 [...], 0 to V - 1 or ``ignore_index``.
        bias: [V] or None.
        lora: (lora_a [R, D], lora_b [V, R], scale), an adapter on the head, or None.
        softcap, logit_scale: logits are softcap tanh(logit_scale z / softcap), or logit_scale z.
        shift: each token has the next one's label, along the last dimension of labels.
        entropy: also give the entropy of each token's distribution, in nats.
        teacher: gives kl, KL(teacher || student) over the whole vocabulary, in nats.
        budget: MiB of logits at once; more means fewer, larger matmuls, and one less for a trained
            bf16 head once it holds all rows. None: 64, or on a CPU what 256 rows take if that is
            less and the head is frozen. A quantized weight is decoded beside it, see
            ``pyft.limit_scratch``. The gradient of a trained 16-bit head copies the rows of hidden
            that count, where some do not; that of its adapter or bias is summed in fp32.
        group: a torch.distributed process group whose ranks each have some rows of weight, in their
            order; bias and lora_b likewise. labels count over all.

    Returns:
        A TokenLogprobs. logprob, lse, entropy and kl are differentiable in hidden, weight, bias and
        the adapter, teacher apart.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, a label that is none (not looked at
            under torch.compile before it runs), a budget below a row of logits.
    """
    op = "linear_logprobs"
    call = as_call(
        op, hidden, weight, labels, bias, lora, ignore_index, softcap, logit_scale, shift, budget,
        group, None, teacher,
    )  # fmt: skip
    try:
        if call.name == "reference" and group is None:
            found = _of_reference(call, entropy)
        else:
            wanted = Wanted(mean=entropy, cross=teacher is not None, top=True)
            sums, teacher_lse = token_statistics(call, wanted, group)
            logprob, kl = sums.target - sums.lse, None
            if teacher_lse is not None:
                kl = sums.lse - teacher_lse - sums.cross
            entropies = sums.lse - sums.mean if entropy else None
            found = TokenLogprobs(logprob, sums.lse, sums.argmax, entropies, kl)
    except LabelError as error:
        raise located(error, op, labels, shift, call.total) from None
    shaped = (None if x is None else x.view(labels.shape) for x in found)
    return TokenLogprobs(*shaped)  # type: ignore[arg-type]


def _of_reference(call: Call, entropy: bool) -> TokenLogprobs:
    check_labels(call)
    z = None
    if call.teacher_hidden is not None:
        capped = implementation("logits", "reference").capped
        weight, bias = dense_head(call, call.teacher_hidden, teacher=True)
        z = torch.nn.functional.linear(call.teacher_hidden, weight, bias)
        z = capped(z, call.teacher_scale, call.teacher_softcap)
    weight, bias = dense_head(call, call.hidden)
    reference = implementation("linear_logprobs", "reference").linear_logprobs
    rule = (call.ignore_index, call.logit_scale, call.softcap)
    logprob, lse, entropies, kl, argmax = reference(
        call.hidden, weight, call.labels, bias, *rule, z
    )
    return TokenLogprobs(
        logprob, lse, argmax, entropies if entropy else None, None if z is None else kl
    )


def check_labels(call: Call) -> None:
    """Raise where a label is none, if the labels are there to be looked at."""
    if plain((call.hidden, call.labels)):
        counted(call)


def dense_head(call: Call, hidden: Tensor, teacher: bool = False) -> tuple[Tensor, Tensor | None]:
    """The weight with its adapter in it, and the bias, as the reference takes them."""
    p = call.teacher if teacher else call.head
    weight, lora_a, lora_b, bias = reference_arguments(p, hidden)
    if lora_a is not None and lora_b is not None:
        weight = weight + p.scale * (lora_b @ lora_a)
    return weight, bias
