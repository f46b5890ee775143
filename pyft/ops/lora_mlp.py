"""The gated MLP of LoRA linears.

    g = gate(x), u = up(x), h = act(g) u, y = down(h)
    gate, up and down as in ``pyft.ops.shared.projection``

    x [M, K]   g, u, h [M, I]   y, dY [M, N]

    dh = dY W_d + drop(dS_d A_d)
    dg = dh u act'(g)    du = dh act(g)    h again             in one pass
    dX = dg W_g + du W_u + drop([dS_g | dS_u] [A_g ; A_u])

Saved for the backward: g and u, or with ``recompute`` neither, and they are multiplied again; x
(where it is needed) and the adapters' inputs S. Never h.
Source: Shazeer, GLU Variants Improve Transformer (2020).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyft.backend import backend, chosen, implementation, select
from pyft.errors import UsageError
from pyft.op import Op, Primitive
from pyft.ops import glu, norm
from pyft.ops.dropout import Dropout, as_seed, check_probability
from pyft.ops.lora_linear import entering
from pyft.ops.lora_qkv import Given, given_projection, reference_projection
from pyft.ops.shared.group import (
    NormInput,
    checked_norm_input,
    fields_of,
    needs_of,
    origin_of,
    spread,
    statics_of,
    tensors_of,
)
from pyft.ops.shared.projection import (
    FIELDS,
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
from pyft.ops.shared.rows import as_rows, empty_rows

_COUNT = 3  # gate, up, down; up has no rows where the gate's are both's
_PROJECTIONS = ", ".join(schema(name) for name in ("_gate", "_up", "_down"))
_STATIC = "Tensor? seed, float dropout_p, str activation, str name"
_ORIGIN = "Tensor? norm_weight, bool rebuild, float eps, float offset"


def _drops(seed: Tensor | None, p: float) -> tuple[Dropout, Dropout]:
    """Of the input of gate and up, and of down's."""
    return Dropout(seed, p), Dropout(None if seed is None else seed + 1, p)


def _first(projections: Sequence[Projection]) -> list[Projection]:
    """Gate and up, or the gate alone."""
    return [p for p in projections[:2] if p.out_features]


def _halves(ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if len(ys) == 2:
        return ys[0], ys[1]
    i = ys[0].shape[1] // 2
    return ys[0][:, :i], ys[0][:, i:]


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """y, S of gate and up, S of down, and gate and up themselves unless ``recompute``."""
    projections, rest = unflatten(arguments[: FIELDS * _COUNT]), arguments[FIELDS * _COUNT :]
    _, _, _, _, buffer, recompute, seed, p, activation, name = rest
    first, down = _first(projections), projections[2]
    drop, drop_down = _drops(seed, p)
    with backend(name):
        select("lora_mlp", x.device)  # raises where the backend asked for by name cannot run
        s = inputs_of_adapters(x, first, drop)
        ys = outputs(x, s, first, buffer)
        room = down.rank if down.weight is None else 0
        h = glu.forward(*_halves(ys), activation, "auto", room)
        s_down = inputs_of_adapters(h, [down], drop_down)
        wide = h.as_strided((h.shape[0], h.shape[1] + room), (h.stride(0), 1)) if room else None
        (y,) = outputs(h, s_down, [down], wide)
    kept = [x.new_empty(0) for _ in first] if recompute else ys
    return y, s, s_down, kept[0], kept[1] if len(kept) == 2 else x.new_empty(0)


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    projections, rest = unflatten(arguments[: FIELDS * _COUNT]), arguments[FIELDS * _COUNT :]
    recompute = rest[5]
    first, down = _first(projections), projections[2]
    m, i = x.shape[0], _width(projections)
    fake_scratch(x, first, x.shape[1])
    ys = [x.new_empty(m, p.out_features) for p in first]
    x.new_empty(m, i)  # h
    fake_scratch(x, [down], i)
    kept = [x.new_empty(0) for _ in first] if recompute else ys
    ranks = sum(p.rank for p in first)
    return (
        x.new_empty(m, down.out_features), x.new_empty(m, ranks), x.new_empty(m, down.rank),
        kept[0], kept[1] if len(kept) == 2 else x.new_empty(0),
    )  # fmt: skip


def _width(projections: Sequence[Projection]) -> int:
    """I."""
    gate, up = projections[0].out_features, projections[1].out_features
    return up or gate // 2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *arguments = inputs
    projections, rest = unflatten(arguments[: FIELDS * _COUNT]), arguments[FIELDS * _COUNT :]
    h, norm_weight, eps, offset, _, recompute, seed, p, activation, name = rest
    ctx.needs = [x.requires_grad, *needs_of(projections)]
    ctx.rebuild = h is not None
    needs_x = recompute or any(ctx.needs[1 + 4 * i + j] for i in (0, 1) for j in (0, 1))
    ctx.in_features, ctx.recompute = x.shape[1], recompute
    if not needs_x:
        x, ctx.rebuild = x.new_empty(0, x.shape[1]), False
    _, s, s_down, gate, up = output
    kept = (h if ctx.rebuild else x, s, s_down, gate, up, norm_weight, seed)
    ctx.save_for_backward(*kept, *tensors_of(projections), *(p.bias for p in projections[:2]))
    ctx.static = statics_of(projections)
    ctx.rest = (eps, offset, p, activation, name)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    after = (None,) * 10
    if dy is None:
        return (None,) * (1 + FIELDS * _COUNT) + after
    x, s, s_down, gate, up, norm_weight, seed, *tensors = ctx.saved_tensors
    eps, offset, p, activation, name = ctx.rest
    *tensors, gate_bias, up_bias = tensors
    fields = fields_of(tensors, ctx.static)
    fields[4], fields[FIELDS + 4] = gate_bias, up_bias  # to make gate and up again
    found = _lora_mlp_backward(
        dy.contiguous(), x, s, s_down, gate, up, norm_weight, ctx.rebuild, eps, offset, *fields,
        seed, p, activation, name, ctx.recompute, ctx.in_features, ctx.needs,
    )  # fmt: skip
    return *spread(found, ctx.needs, _COUNT), *after


def _gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    s_down: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    rebuild: bool,
    eps: float,
    offset: float,
    *arguments: Any,
) -> list[Tensor]:
    projections = unflatten(arguments[: FIELDS * _COUNT])
    seed, p, activation, name, recompute, in_features, needs = arguments[FIELDS * _COUNT :]
    first, down = _first(projections), projections[2]
    leaves = [Needs(*needs[i : i + 4]) for i in range(1, len(needs), 4)]
    of_first, of_down = leaves[: len(first)], leaves[2]
    drop, drop_down = _drops(seed, p)
    need_h = of_down.lora_a or of_down.weight
    need_x = any(need.weight or need.lora_a for need in of_first)
    need_ds = needs[0] or any(need.lora_a for need in of_first)
    need_dh = needs[0] or any(any(need) for need in of_first)

    def normed() -> Tensor:
        if not rebuild:
            return x
        return norm.forward(x, None, norm_weight, None, eps, offset, False, 0, "auto")[0]

    with backend(name):
        ys = outputs(normed(), s, first) if recompute else [gate, up][: len(first)]
        g, u = _halves(ys)
        ds_down = adapter_gradients([dy], [down], need_dh or of_down.lora_a)
        h = None
        dx = []
        if need_dh:
            dh = input_gradient([dy], ds_down, [down], drop_down, g.shape[1])
            # What was made here is written over; what was saved never is.
            dys = ys if recompute else [empty_rows(y, *y.shape) for y in ys]
            h = dh
            glu.backward(dh, g, u, activation, *_halves(dys), h if need_h else None, "auto")
        elif need_h:
            h = glu.forward(g, u, activation, "auto")
        of_last = leaf_gradients([dy], ds_down, h, s_down, [down], [of_down], drop_down)
        if not need_dh:
            return of_last
        del h, dh
        ds = adapter_gradients(dys, first, need_ds)
        if needs[0]:
            dx = [input_gradient(dys, ds, first, drop, in_features)]
        again = normed() if need_x else None
        found = leaf_gradients(dys, ds, again, s, first, of_first, drop)
    return [*dx, *found, *of_last]


def _fake_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    s_down: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    rebuild: bool,
    eps: float,
    offset: float,
    *arguments: Any,
) -> list[Tensor]:
    projections = unflatten(arguments[: FIELDS * _COUNT])
    *_, in_features, needs = arguments
    leaves = [Needs(*needs[i : i + 4]) for i in range(1, len(needs), 4)]
    m, i = dy.shape[0], _width(projections)
    temporary = [x.new_empty(m, i) for _ in range(3)]  # dh, which becomes h, dg, du
    if rebuild:
        temporary.append(x.new_empty(m, in_features))
    fake_scratch(x, projections[2:], i)
    fake_scratch(x, _first(projections), in_features)
    dx = [x.new_empty(m, in_features)] if needs[0] else []
    found = fake_leaf_gradients(x, projections[:2], leaves[:2], in_features)
    return [*dx, *found, *fake_leaf_gradients(x, projections[2:], leaves[2:], i)]


_lora_mlp_backward = Primitive(
    "lora_mlp_backward",
    _gradients,
    _fake_gradients,
    f"(Tensor dy, Tensor x, Tensor s, Tensor s_down, Tensor gate, Tensor up, {_ORIGIN}, "
    f"{_PROJECTIONS}, {_STATIC}, bool recompute, int in_features, bool[] needs) -> Tensor[]",
)
_lora_mlp = Op(
    "lora_mlp",
    _forward,
    _fake,
    _save,
    _backward,
    f"(Tensor x, {_PROJECTIONS}, Tensor? h, Tensor? norm_weight, float eps, float offset, "
    f"Tensor? buffer, bool recompute, {_STATIC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def lora_mlp(
    x: Tensor,
    gate: Given,
    up: Given | None,
    down: Given,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_input: NormInput | None = None,
    recompute: bool = False,
) -> Tensor:
    """down(act(gate(x)) up(x)), each projection with its own adapter or none.

    Args:
        x: [..., K], any floating dtype, any strides.
        gate, up: (weight, bias, lora_a, lora_b, scale), each as ``lora_linear`` takes them, weights
            [I, K]. up None: the gate's weight [2I, K] holds the gate's rows and then up's.
        down: the same, weight [N, I].
        activation: "silu", "gelu", "gelu_tanh" or "relu2".
        dropout_p, seed: one mask for x, that of seed + 1 for down's input, see ``pyft.dropout``.
        norm_input: what x is the RMSNorm of, so that x need not be kept: ``pyft.NormInput``.
        recompute: keep neither gate(x) nor up(x), [M, I] each: the backward multiplies them again,
            which costs a third more of the MLP's matmuls.

    Returns:
        [..., N] of x's dtype.

    Raises:
        UsageError: shapes or dtypes that do not fit, an activation that is not one of the four, a
            backend asked for by name that cannot run.
    """
    x, cast = entering(x)
    check_probability("lora_mlp", dropout_p)
    if activation not in glu.ACTIVATIONS:
        raise UsageError(
            f"lora_mlp: activation {activation!r} is not one of {', '.join(glu.ACTIVATIONS)}"
        )
    projections = [given_projection("lora_mlp: gate", x, gate, cast)]
    if up is None:
        projections.append(Projection(None, [], None, None, None, "", 0, 0, 0.0))
    else:
        projections.append(given_projection("lora_mlp: up", x, up, cast))
    rows, two = projections[0].out_features, projections[1].out_features
    if (up is None and rows % 2) or (up is not None and rows != two):
        raise UsageError(
            f"lora_mlp: gate gives {rows} features and up {two or 'is None'}; "
            "they must give equally many, and a gate alone an even number"
        )
    ranks = sum(p.rank for p in projections)
    norm_input = checked_norm_input("lora_mlp", x, norm_input, cast, ranks)
    i = _width(projections)
    projections.append(given_projection("lora_mlp: down", x.new_empty(0, i), down, cast))
    drawn = as_seed(seed) if dropout_p > 0 else None
    name = chosen()
    if name == "reference":
        reference = implementation("lora_mlp", "reference").lora_mlp
        q = [reference_projection(p, x) for p in _first(projections)]
        last = reference_projection(projections[2], x.new_empty(0, i))
        mask_seed = 0 if drawn is None else int(drawn)
        given = (q[0], q[1] if up is not None else None, last)
        found: Tensor = reference(x, *given, activation, dropout_p, mask_seed)
        return found
    fields = [field for projection in projections for field in projection]
    origin: tuple[Any, ...] = (None, None, 0.0, 0.0, None)
    if norm_input is not None:
        origin = origin_of(x, norm_input)
    static = (drawn, float(dropout_p), activation, name)
    y: Tensor = _lora_mlp(as_rows(x), *fields, *origin, recompute, *static)[0]
    return y.view(*x.shape[:-1], y.shape[1])
