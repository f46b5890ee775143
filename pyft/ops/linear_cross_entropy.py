"""The cross-entropy of a linear head, without its logits in memory.

    u = softcap tanh(scale (h Wᵀ + bias + s (h Aᵀ) Bᵀ) / softcap)      h [N, D]   W [V, D]
    loss_i = (1 - ε) w_y (lse - u_y) + ε / V Σ_c w_c (lse - u_c) + z_loss lse²

    dloss_i/du = p ((1 - ε) w_y + ε / V Σ w + 2 z_loss lse) - (1 - ε) w_y [c = y] - ε / V w_c

``pyft.ops.shared.head`` says how the logits are gone over. A loss that is one number has its
gradient made in the forward, of the logits that are there: dh for each row by itself, which the
backward multiplies by what the row weighs, fp32 sums for bias and adapter, and dW where it is fp32
or the budget holds all rows at once. The dW of other 16-bit weights multiplies the logits once
more, in the backward, for a sum over chunks would take memory of twice its size. Saved: dh, lse and
these sums; of the inputs what dW needs.

Otherwise (reduction "none", no gradient, weights of tokens that are learned, a sharded head) it is
composed of ``linear_logprobs``' sums, whose backward multiplies the logits again and saves lse.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import backend, implementation, select
from pyft.op import Op, packed, unpacked
from pyft.ops.linear_logprobs import check_labels, dense_head, head_gradients, token_statistics
from pyft.ops.logits import Statistics, Wanted, Weights, statistics, wide
from pyft.ops.shared.head import (
    FLAT,
    SCHEMA,
    Call,
    LabelError,
    Sums,
    Wants,
    counted,
    dw_by_rows,
    over_rows,
    rows_of,
    write_rows,
)
from pyft.ops.shared.head_input import Adapter, as_call, located
from pyft.ops.shared.loss_input import (
    check_numbers,
    checked_token_weights,
    threshold_of,
)
from pyft.ops.shared.rows import empty_rows
from pyft.quantized import QuantizedTensor

_ROWS = 256  # of dh that are in fp32 at once


class LossMetrics(NamedTuple):
    """Means over the tokens that count, fp32 [] without gradients; 0 where there are none.

    accuracy: how often the largest logit is the label's; entropy: of the distributions, in nats;
    tokens: how many count.
    """

    accuracy: Tensor
    entropy: Tensor
    tokens: Tensor


class Objective(NamedTuple):
    """What is made of the sums over logits."""

    label_smoothing: float
    z_loss: float
    total: int  # labels
    all_weights: Tensor | float  # of classes, summed

    @property
    def _even(self) -> float:
        return self.label_smoothing / self.total

    def losses(self, found: Statistics, weights: Tensor | float) -> Tensor:
        """[M]; ``weights``: of each row's label."""
        loss = (1 - self.label_smoothing) * weights * (found.lse - found.target)
        if self.label_smoothing:
            loss = loss + self._even * (self.all_weights * found.lse - found.smooth)
        return loss + self.z_loss * found.lse.square() if self.z_loss else loss

    def derivatives(self, lse: Tensor, weights: Tensor | float) -> Weights:
        """Of ``losses`` in each sum."""
        own = (1 - self.label_smoothing) * weights * torch.ones_like(lse)
        even = torch.full_like(lse, -self._even) if self.label_smoothing else None
        by_lse = own + self._even * self.all_weights
        if self.z_loss:
            by_lse = by_lse + 2 * self.z_loss * lse
        return Weights(by_lse, -own, even)


class _Given(NamedTuple):
    """The arguments of the op after its ``Call``'s, in the order of the schema."""

    token_weights: Tensor | None  # [N]
    items: Tensor | None  # what a mean divides by
    all_weights: Tensor | None  # of classes, summed; None: each is 1
    label_smoothing: float
    z_loss: float
    mean: bool
    metrics: bool
    threshold: float
    wants: list[bool]

    def objective(self, call: Call) -> Objective:
        """For a call's labels."""
        weights = float(call.total) if self.all_weights is None else self.all_weights
        return Objective(self.label_smoothing, self.z_loss, call.total, weights)


_NUMBERS = (
    "Tensor? token_weights, Tensor? items, Tensor? all_weights, float label_smoothing, "
    "float z_loss, bool mean, bool metrics, float threshold, bool[] wants"
)


def _of_classes(call: Call, labels: Tensor) -> Tensor | float:
    """The weight of each label's class."""
    return 1.0 if call.class_weights is None else call.class_weights[labels]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """loss; correct, entropies, tokens and divisor; lse [N]; dh of each row's loss [N, D], dW where
    it is made here, the sums for lora_a, lora_b and bias, and the columns that were kept.
    """
    call, given = Call.of(arguments[:FLAT]), _Given(*arguments[FLAT:])
    wants, objective = Wants(*given.wants), given.objective(call)
    dtype = wide(call.hidden.dtype)
    with backend(call.name):
        select("linear_cross_entropy", call.hidden.device)
        rows = counted(call)
        weights = _of_classes(call, rows.labels)
        shares = call.hidden.new_ones(len(rows.labels), dtype=dtype)
        if given.token_weights is not None:
            shares = rows_of(given.token_weights.to(dtype), rows.places, 0, len(shares))
        divisor = _divisor(given, shares * weights)
        shares = shares / divisor
        losses, lse = torch.empty_like(shares), call.hidden.new_zeros(len(call.labels), dtype=dtype)
        metrics = call.hidden.new_zeros(4, dtype=torch.float64)
        sums = Sums(call, rows, wants, given.threshold)
        wanted = Wanted(bool(given.label_smoothing), given.metrics, False, given.metrics)
        for chunk in over_rows(call, rows):
            part = slice(chunk.begin, chunk.end)
            found = statistics(chunk.tile, wanted, call.name)
            own = weights[part] if isinstance(weights, Tensor) else weights
            losses[part] = objective.losses(found, own)
            write_rows(lse, found.lse, rows.places, chunk.begin, chunk.end)
            if given.metrics:
                metrics[0] += (found.argmax == chunk.tile.labels).sum()
                metrics[1] += (found.lse - found.mean).sum()
            if wants.rows or sums.by_rows or given.threshold:
                derivatives = objective.derivatives(found.lse, own)
                sums.add(chunk, found.lse, None, derivatives, shares[part])
        metrics[2] = len(losses)
        metrics[3] = divisor
        losses = losses.where(shares != 0, 0.0)  # what weighs nothing may be infinite
        loss = (losses * shares).sum(dtype=torch.float64).to(dtype)
    return loss, metrics, lse, sums.hidden, sums.weight, *sums.of_leaves(), sums.kept


def _divisor(given: _Given, shares: Tensor) -> Tensor:
    """What the sum of the losses is divided by; 1 instead of 0."""
    if not given.mean:
        return shares.new_ones(())
    divisor = shares.sum() if given.items is None else given.items.to(shares.dtype)
    return torch.where(divisor == 0, 1.0, divisor)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, given = Call.of(arguments[:FLAT]), _Given(*arguments[FLAT:])
    wants, hidden, p = Wants(*given.wants), call.hidden, call.head
    n, d = hidden.shape
    sums = hidden.new_empty((), dtype=wide(hidden.dtype))
    shapes = ((p.rank, d), (p.out_features, p.rank), (p.out_features,))
    wanted = (wants.lora_a, wants.lora_b, wants.bias)
    return (
        sums,
        hidden.new_empty(4, dtype=torch.float64),
        sums.new_empty(n),
        hidden.new_empty((n, d) if wants.hidden else 0),
        hidden.new_empty((p.out_features, d) if _dw_by_rows(call, given) else 0),
        *(sums.new_empty(s if want else 0) for s, want in zip(shapes, wanted, strict=True)),
        hidden.new_empty(p.out_features if given.threshold else 0, dtype=torch.uint8),
    )


def _dw_by_rows(call: Call, given: _Given) -> bool:
    """Whether dW is made in the forward."""
    return dw_by_rows(call, Wants(*given.wants), given.threshold > 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    call, given = Call.of(inputs[:FLAT]), _Given(*inputs[FLAT:])
    _, metrics, lse, *made = output
    ctx.dtype, ctx.wants = inputs[0].dtype, Wants(*given.wants)
    needed = ctx.wants.weight and not _dw_by_rows(call, given)
    tensors, ctx.rest = packed(inputs if needed else ())
    ctx.save_for_backward(metrics, lse, given.token_weights, *made, *tensors)


def _backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    count = FLAT + len(_Given._fields)
    if g is None:
        return (None,) * count
    metrics, lse, token_weights, dh, dw, d_a, d_b, d_bias, kept, *tensors = ctx.saved_tensors
    wants = ctx.wants
    # The gradients are written where they were made, unless the graph is kept for another backward.
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    keeps = retained or not getattr(ctx, "outputs_are_ours", False)
    shares = (g / metrics[3]).to(lse.dtype).expand_as(lse)
    if token_weights is not None:
        shares = shares * token_weights.to(lse.dtype)
    into: list[Tensor | None] = [None] * count
    if wants.weight and not tensors:
        into[4] = dw * g if keeps else dw.mul_(g)
    elif wants.weight:
        inputs = unpacked(tensors, ctx.rest)
        call, given = Call.of(inputs[:FLAT]), _Given(*inputs[FLAT:])
        own = _of_classes(call, call.labels.clamp(0, call.total - 1))
        weights = given.objective(call).derivatives(lse, own)
        weighed = (None if x is None else x * shares for x in weights)
        only = [False, True, False, False, False]
        known = (*call.flat(), lse, None, None, *weighed, only, kept)
        into[4] = head_gradients(*known)[1]
    if wants.hidden:
        into[0] = _times_rows(dh, shares, keeps)
    for place, wanted, made in zip((6, 7, 8), wants[2:], (d_a, d_b, d_bias), strict=True):
        if wanted:
            into[place] = (made * g).to(ctx.dtype)
    return tuple(into)


def _times_rows(x: Tensor, shares: Tensor, keeps: bool) -> Tensor:
    """x [N, D] times shares [N], rounded once; in x's memory unless that ``keeps`` its values."""
    if torch.compiler.is_compiling() or isinstance(x.shape[0], torch.SymInt):
        return (x.to(shares.dtype) * shares[:, None]).to(x.dtype)  # fused, for any number of rows
    out = empty_rows(x, *x.shape) if keeps else x
    for begin in range(0, len(x), _ROWS):
        part = slice(begin, begin + _ROWS)
        out[part] = x[part].to(shares.dtype) * shares[part, None]
    return out


_linear_cross_entropy = Op(
    "linear_cross_entropy",
    _forward,
    _fake,
    _save,
    _backward,
    f"({SCHEMA}, {_NUMBERS}) -> ({', '.join(['Tensor'] * 9)})",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    labels: Tensor,
    bias: Tensor | None = None,
    lora: Adapter | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = False,
    gradient_filter: bool | float = False,
    metrics: bool = False,
    budget: float | None = None,
    group: Any = None,
) -> Any:
    """The cross-entropy of softmax(hidden Wᵀ) and labels, forward and backward, with no more of the
    logits in memory than ``budget`` allows.

    Args:
        hidden: [..., D], what the head is given; any floating dtype, any strides.
        weight: [V, D], a tensor of hidden's dtype or a QuantizedTensor. One that needs no gradient
            gets none and takes no memory for it.
        labels: int64 or int32 [...], 0 to V - 1 or ``ignore_index``, whose rows are left out of
            everything.
        bias: [V] or None.
        lora: (lora_a [R, D], lora_b [V, R], scale), an adapter on the head, or None.
        reduction: "mean" over what the tokens weigh (0 where there is none), "sum", or "none".
        softcap, logit_scale: logits are softcap tanh(logit_scale z / softcap), or logit_scale z.
        label_smoothing: so much of the target is spread evenly over the labels, 0 to 1.
        z_loss: so much times log-sum-exp squared is added to each token's loss.
        class_weights: floating [V], as torch's cross_entropy weighs classes; no gradient.
        token_weights: floating [...] of labels' shape, of each label: times its loss; a mean
            divides by their sum.
        num_items_in_batch: what a mean divides by instead: the tokens of all micro-batches of one
            step, so that their sum is the loss of the whole.
        shift: each token has the next one's label, along the last dimension of labels.
        gradient_filter: leave out of the gradients what no row of a chunk gives a probability of so
            much; True: a 32nd of the dtype's eps (2^-12 in bf16). Faster where predictions are
            sure, not exact; hidden and a plain weight only, no label_smoothing. The reference
            leaves nothing out.
        metrics: also return a ``LossMetrics``.
        budget: MiB of logits at once; more means fewer, larger matmuls, and one less for a trained
            bf16 head once it holds all rows. None: 64, or on a CPU what 256 rows take if that is
            less and the head is frozen. A quantized weight is decoded beside it, see
            ``pyft.limit_scratch``. The gradient of a trained 16-bit head copies the rows of hidden
            that count, where some do not; that of its adapter or bias is summed in fp32.
        group: a torch.distributed process group whose ranks each have some rows of weight, in their
            order; bias and lora_b likewise. labels and class_weights count over all.

    Returns:
        The loss, fp32 (float64 of float64), [] or with "none" [...]; with ``metrics`` also those.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, a label that is none (not looked at
            under torch.compile before it runs), a budget below a row of logits.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2024), for the
    filter.
    """
    op = "linear_cross_entropy"
    check_numbers(reduction, label_smoothing, z_loss, num_items_in_batch)
    token_weights = checked_token_weights(hidden, labels, token_weights)
    call = as_call(
        op, hidden, weight, labels, bias, lora, ignore_index, softcap, logit_scale, shift, budget,
        group, class_weights,
    )  # fmt: skip
    learned = token_weights is not None and token_weights.requires_grad
    threshold = threshold_of(call, gradient_filter, label_smoothing, group, reduction, learned)
    if token_weights is not None:
        if shift and token_weights.numel():
            token_weights = torch.nn.functional.pad(token_weights[..., 1:], (0, 1))
        counts = call.labels != call.ignore_index
        token_weights = token_weights.reshape(-1).where(counts, 0.0)
    all_weights = None
    if class_weights is not None and label_smoothing:
        all_weights = class_weights.sum(dtype=torch.float64)
    items = num_items_in_batch
    if items is not None:
        dtype = wide(call.hidden.dtype)
        items = torch.as_tensor(items, dtype=dtype, device=call.hidden.device).reshape(())
    leaves = (call.hidden, call.head.weight, call.head.lora_a, call.head.lora_b, call.head.bias)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    given = _Given(
        token_weights, items, all_weights, float(label_smoothing), float(z_loss),
        reduction == "mean", metrics, threshold, wants,
    )  # fmt: skip
    try:
        if call.name == "reference" and group is None:
            loss, sums = _of_reference(call, given, reduction)
        elif reduction == "none" or group is not None or learned or not any(wants):
            loss, sums = _composed(call, given, reduction, class_weights, group)
        else:
            loss, sums, *_ = _linear_cross_entropy(*call.flat(), *given)
    except LabelError as error:
        raise located(error, op, labels, shift, call.total) from None
    if reduction == "none":
        loss = loss.view(labels.shape)
    if not metrics:
        return loss
    tokens = sums[2].clamp_min(1)
    return loss, LossMetrics(*(x.float() for x in (sums[0] / tokens, sums[1] / tokens, sums[2])))


def _composed(
    call: Call, given: _Given, reduction: str, class_weights: Tensor | None, group: Any
) -> tuple[Tensor, Tensor]:
    """The loss of sums that are differentiable themselves, and the metrics' sums."""
    wanted = Wanted(bool(given.label_smoothing), given.metrics, False, given.metrics)
    found, _ = token_statistics(call, wanted, group)
    counts = call.labels != call.ignore_index
    own: Tensor | float = 1.0
    if class_weights is not None:
        own = class_weights.to(found.lse.dtype)[call.labels.where(counts, 0)]
    shares = counts.to(found.lse.dtype)
    if given.token_weights is not None:
        shares = given.token_weights.to(shares.dtype).where(counts, 0.0)
    losses = given.objective(call).losses(found, own).where(counts & (shares != 0), 0.0) * shares
    loss = losses
    if reduction != "none":
        loss = losses.sum(dtype=torch.float64) / _divisor(given, shares * own)
        loss = loss.to(losses.dtype)
    sums = losses.new_zeros(3, dtype=torch.float64)
    if given.metrics:
        sums[0] = ((found.argmax == call.labels) & counts).sum()
        sums[1] = (found.lse - found.mean).detach().where(counts, 0.0).sum()
        sums[2] = counts.sum()
    return loss, sums


def _of_reference(call: Call, given: _Given, reduction: str) -> tuple[Tensor, Tensor]:
    check_labels(call)
    weight, bias = dense_head(call, call.hidden)
    reference = implementation("linear_cross_entropy", "reference").linear_cross_entropy
    loss: Tensor = reference(
        call.hidden, weight, call.labels, bias, call.ignore_index, reduction, call.softcap,
        call.logit_scale, given.label_smoothing, given.z_loss, call.class_weights,
        given.token_weights, given.items,
    )  # fmt: skip
    sums = loss.new_zeros(3, dtype=torch.float64)
    if given.metrics:
        logprobs = implementation("linear_logprobs", "reference").linear_logprobs
        rule = (call.ignore_index, call.logit_scale, call.softcap)
        with torch.no_grad():
            *_, entropy, _, argmax = logprobs(call.hidden, weight, call.labels, bias, *rule)
        counts = call.labels != call.ignore_index
        sums = torch.stack([(argmax == call.labels).sum(), entropy.sum(), counts.sum()])
    return loss, sums
