"""The fused op over several projections of one input, whose equations are in ``projection``.

Saved for the backward: x (where an A or a dense W is trained) and S (where a B is), besides the
weights themselves; where x is known to be the RMSNorm of h, h instead of x, which is made again.
The decoded weights, the mask and drop(x) are made again too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyft.backend import backend, select
from pyft.errors import UsageError
from pyft.op import Op, Primitive, plain
from pyft.ops import norm
from pyft.ops.dropout import Dropout
from pyft.ops.shared.projection import (
    FIELDS,
    LEAVES,
    Needs,
    Projection,
    adapter_gradients,
    fake_leaf_gradients,
    fake_scratch,
    input_gradient,
    inputs_of_adapters,
    leaf_gradients,
    outputs,
    schema,
    unflatten,
)
from pyft.ops.shared.rows import as_rows

_REST = "Tensor? seed, float dropout_p, str name"


class NormInput(NamedTuple):
    """Says that x is ``rms_norm(h, weight, eps, offset=offset)``: the backward makes x again of h,
    which is kept for the norm's own backward anyway, and x need not be kept.

    Attributes:
        h: [..., K], what the norm was taken of.
        weight: [K] or None.
        eps, offset: the norm's.
        buffer: [M, K + ranks or more] or None. x is its left part, and the op may write to the
            rest, so that one matmul gives base and adapter. Only ``rms_norm(..., tail=T)`` makes
            such an x; its buffer is ``x.data.as_strided((M, K + T), (K + T, 1))``.
    """

    h: Tensor
    weight: Tensor | None
    eps: float
    offset: float = 0.0
    buffer: Tensor | None = None


class Group:
    """A fused op of ``count`` projections: y_0, y_1, .. of x [M, K]."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        fields = ", ".join(schema(str(i)) for i in range(count))
        tensors = ", ".join(["Tensor"] * (count + 1))
        origin = "Tensor? h, Tensor? norm_weight, float eps, float offset, Tensor? buffer"
        self.gradients = Primitive(
            f"{name}_backward",
            self._gradients,
            self._fake_gradients,
            "(Tensor[] dys, Tensor x, Tensor s, Tensor? norm_weight, bool rebuild, float eps, "
            f"float offset, {fields}, {_REST}, int in_features, bool[] needs) -> Tensor[]",
        )
        self.op = Op(
            name,
            self._forward,
            self._fake,
            self._save,
            self._backward,
            f"(Tensor x, {fields}, {origin}, {_REST}) -> ({tensors})",
        )

    def __call__(
        self,
        x: Tensor,
        projections: Sequence[Projection],
        norm_input: NormInput | None,
        drop: Dropout,
        name: str,
    ) -> list[Tensor]:
        """y_i [M, N_i] of rows x [M, K]."""
        origin: tuple[Any, ...] = (None, None, 0.0, 0.0, None)
        if norm_input is not None:
            origin = origin_of(x, norm_input)
        fields = [field for projection in projections for field in projection]
        found = self.op(x, *fields, *origin, drop.seed, float(drop.p), name)
        return list(found[: self.count])

    def _forward(self, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        projections, rest = self._parse(arguments)
        _, _, _, _, buffer, seed, p, name = rest
        with backend(name):
            select(self.name, x.device)  # raises where the backend asked for by name cannot run
            s = inputs_of_adapters(x, projections, Dropout(seed, p))
            return *outputs(x, s, projections, buffer), s

    def _fake(self, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        projections, _ = self._parse(arguments)
        fake_scratch(x, projections, x.shape[1])
        m = x.shape[0]
        ys = (x.new_empty(m, p.out_features) for p in projections)
        return *ys, x.new_empty(m, sum(p.rank for p in projections))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *arguments = inputs
        projections, rest = self._parse(arguments)
        h, norm_weight, eps, offset, _, seed, p, name = rest
        ctx.needs = [x.requires_grad, *needs_of(projections)]
        s = output[-1]
        ctx.rebuild = h is not None
        ctx.in_features = x.shape[1]
        of_leaves = [Needs(*ctx.needs[i : i + 4]) for i in range(1, len(ctx.needs), 4)]
        if not any(need.weight or need.lora_a for need in of_leaves):
            x, ctx.rebuild = x.new_empty(0, x.shape[1]), False  # dX needs no x
        if not any(need.lora_b for need in of_leaves):
            s = s.new_empty(0, s.shape[1])
        kept = [h if ctx.rebuild else x, s, norm_weight, seed]
        ctx.save_for_backward(*kept, *tensors_of(projections))
        ctx.static = statics_of(projections)
        ctx.rest = (eps, offset, p, name)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dys = gradients[: self.count]
        after = (None,) * 8
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return (None,) * (1 + FIELDS * self.count) + after
        x, s, norm_weight, seed, *tensors = ctx.saved_tensors
        eps, offset, p, name = ctx.rest
        fields = fields_of(tensors, ctx.static)
        projections = unflatten(fields)
        rows = [
            given.new_zeros(given.shape[0], q.out_features) if dy is None else dy.contiguous()
            for dy, q in zip(dys, projections, strict=True)
        ]
        found = self.gradients(
            rows, x, s, norm_weight, ctx.rebuild, eps, offset, *fields, seed, p, name,
            ctx.in_features, ctx.needs,
        )  # fmt: skip
        return *spread(found, ctx.needs, self.count), *after

    def _gradients(
        self,
        dys: list[Tensor],
        x: Tensor,
        s: Tensor,
        norm_weight: Tensor | None,
        rebuild: bool,
        eps: float,
        offset: float,
        *arguments: Any,
    ) -> list[Tensor]:
        projections = unflatten(arguments[: FIELDS * self.count])
        seed, p, name, in_features, needs = arguments[FIELDS * self.count :]
        drop = Dropout(seed, p)
        leaves = [Needs(*needs[i : i + 4]) for i in range(1, len(needs), 4)]
        need_x, need_a = needs[0], any(need.lora_a for need in leaves)
        with backend(name):
            ds = adapter_gradients(dys, projections, need_x or need_a)
            dx = []
            if need_x:
                dx = [input_gradient(dys, ds, projections, drop, in_features)]
            again: Tensor | None = None
            if need_a or any(need.weight for need in leaves):
                again = x
                if rebuild:
                    static = (eps, offset, False, 0, "auto")
                    again = norm.forward(x, None, norm_weight, None, *static)[0]
            return [*dx, *leaf_gradients(dys, ds, again, s, projections, leaves, drop)]

    def _fake_gradients(
        self,
        dys: list[Tensor],
        x: Tensor,
        s: Tensor,
        norm_weight: Tensor | None,
        rebuild: bool,
        eps: float,
        offset: float,
        *arguments: Any,
    ) -> list[Tensor]:
        projections = unflatten(arguments[: FIELDS * self.count])
        *_, in_features, needs = arguments
        leaves = [Needs(*needs[i : i + 4]) for i in range(1, len(needs), 4)]
        if needs[0]:
            fake_scratch(x, projections, in_features)
        dx = [x.new_empty(dys[0].shape[0], in_features)] if needs[0] else []
        if rebuild:
            x.new_empty(x.shape)
        return [*dx, *fake_leaf_gradients(x, projections, leaves, in_features)]

    def _parse(self, arguments: Sequence[Any]) -> tuple[list[Projection], Sequence[Any]]:
        split = FIELDS * self.count
        return unflatten(arguments[:split]), arguments[split:]


def origin_of(x: Tensor, norm_input: NormInput) -> tuple[Any, ...]:
    """What x is the norm of, as the ops take it."""
    h, weight, eps, offset, buffer = norm_input
    weight = None if weight is None else weight.detach().to(x.dtype).contiguous()
    # Elsewhere inputs may be copied or planned anew: writing beside x is for eager mode.
    buffer = buffer if plain((x, h)) else None
    return as_rows(h).detach(), weight, float(eps), float(offset), buffer


def needs_of(projections: Sequence[Projection]) -> list[bool]:
    """For each projection whether weight, lora_a, lora_b and bias require a gradient."""
    leaves = (leaf for p in projections for leaf in (p.weight, p.lora_a, p.lora_b, p.bias))
    return [leaf is not None and leaf.requires_grad for leaf in leaves]


def tensors_of(projections: Sequence[Projection]) -> list[Tensor | None]:
    """What of projections is saved: weight, lora_a, lora_b and the stored tensors of each."""
    found: list[Tensor | None] = []
    for p in projections:
        found += [p.weight, p.lora_a, p.lora_b, *p.stored]
    return found


def statics_of(projections: Sequence[Projection]) -> list[tuple[int, tuple[Any, ...]]]:
    """The rest of them: how many stored tensors, and the fields that are not tensors."""
    return [(len(p.stored), p[5:]) for p in projections]


def fields_of(
    tensors: Sequence[Tensor | None], statics: Sequence[tuple[int, tuple[Any, ...]]]
) -> list[Any]:
    """The fields of projections, without their biases, from the two above."""
    fields: list[Any] = []
    start = 0
    for count, static in statics:
        weight, lora_a, lora_b = tensors[start : start + 3]
        stored = list(tensors[start + 3 : start + 3 + count])
        fields += [weight, stored, lora_a, lora_b, None, *static]
        start += 3 + count
    return fields


def spread(found: Sequence[Tensor], needs: Sequence[bool], count: int) -> list[Tensor | None]:
    """dX and one gradient or None for each field of ``count`` projections; ``found`` are those that
    are needed.
    """
    rest = iter(found)
    wanted = [next(rest) if need else None for need in needs]
    gradients = [wanted[0]]
    for i in range(count):
        fields: list[Tensor | None] = [None] * FIELDS
        for at, value in zip(LEAVES, wanted[1 + 4 * i : 5 + 4 * i], strict=True):
            fields[at] = value
        gradients += fields
    return gradients


def checked_norm_input(
    op: str, x: Tensor, norm_input: NormInput | None, cast: bool, ranks: int
) -> NormInput | None:
    """What x is the norm of; nothing, where autocast has ``cast`` x since. ``ranks``: of all the
    adapters that read x.

    Raises UsageError where the norm's input does not fit x.
    """
    if norm_input is None:
        return None
    h, weight, _, _, buffer = norm_input
    if cast and h.dtype != x.dtype:
        return None
    if h.shape != x.shape or h.dtype != x.dtype:
        raise UsageError(
            f"{op}: norm_input.h is {h.dtype} {tuple(h.shape)} and x {x.dtype} {tuple(x.shape)}; "
            "they must be alike"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        raise UsageError(
            f"{op}: norm_input.weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}"
        )
    if buffer is None or torch.compiler.is_compiling():
        return norm_input._replace(buffer=None)
    if not _lies_in(x, buffer):
        raise UsageError(f"{op}: norm_input.buffer is not what x lies in")
    rows, k = x.shape[:-1].numel(), x.shape[-1]
    if buffer.dim() != 2 or buffer.shape[0] != rows or buffer.shape[1] < k + ranks:
        raise UsageError(
            f"{op}: norm_input.buffer {tuple(buffer.shape)} does not fit x {tuple(x.shape)} and "
            f"adapters of rank {ranks} in all; need [{rows}, {k + ranks} or more]"
        )
    return norm_input


def _lies_in(x: Tensor, buffer: Tensor) -> bool:
    """Whether rows of x begin where rows of the buffer do."""
    same = buffer.untyped_storage()._cdata == x.untyped_storage()._cdata
    rows = as_rows(x)
    return same and (
        rows.shape[0] < 2
        or (rows.storage_offset(), rows.stride(0)) == (buffer.storage_offset(), buffer.stride(0))
    )
