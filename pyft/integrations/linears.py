"""LoRA linears as the fused ops take them, read from PEFT's modules at every call.

What a layer is asked to do that the ops do not goes to PEFT's own forward. Several active adapters
are one of the sum of their ranks, [A_1 ; A_2] and [s_1 B_1 | s_2 B_2]; DoRA scales the columns of
the result by m / ‖W + s B A‖, the norms of whose rows are taken once a step.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pyft.backend import chosen
from pyft.integrations import bitsandbytes
from pyft.integrations.fused import Fused, hooked, plain_class, replaced
from pyft.integrations.norms import norm_input_of
from pyft.ops.lora_linear import lora_linear
from pyft.ops.lora_qkv import lora_qkv
from pyft.quantized import QuantizedTensor

_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")  # PEFT's classes over bitsandbytes' linears


class Adapted(NamedTuple):
    """A linear with what is active on it: the arguments of ``lora_linear``."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scale: float
    dropout_p: float
    dtype: torch.dtype  # it is computed in
    out_dtype: torch.dtype

    @property
    def rank(self) -> int:
        """Of what is active on it, in all."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    @property
    def projection(self) -> tuple[Any, ...]:
        """As ``lora_qkv`` and ``lora_mlp`` take it."""
        return self[:5]


def adapted(module: nn.Module, x: Tensor) -> Adapted | None:
    """The linear as it is to run on x; None where its own forward has to."""
    if isinstance(module, nn.Linear) and plain_class(module) is nn.Linear:
        dtype = _compute_dtype(module, x, module.weight)
        if dtype is None or hooked(module):
            return None
        return Adapted(
            module.weight, module.bias, None, None, 1.0, 0.0, dtype, _out_dtype(x, False)
        )
    layer: Any = module
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    parts = [part for name in names for part in (layer.lora_A[name], layer.lora_B[name])]
    # What may have changed since apply: hooks, a variant, a weight bitsandbytes has repacked.
    if not names or hooked(base) or any(map(hooked, parts)) or _variant(layer, names):
        return None
    theirs = bitsandbytes.holds(base)
    if theirs and bitsandbytes.obstacle(base):
        return None
    weight = weight_of(layer)
    dtype = _compute_dtype(base, x, weight)
    rates = {_rate(layer, name) for name in names}
    if dtype is None or (len(names) > 1 and rates != {0.0}):
        return None  # each of several adapters would draw a mask of its own
    bias = base.bias
    for name in names:
        if layer.lora_B[name].bias is not None:
            more = layer.lora_B[name].bias * layer.scaling[name]
            bias = more if bias is None else bias + more
    a, b, scale = _summed(layer, names)
    return Adapted(weight, bias, a, b, scale, rates.pop(), dtype, _out_dtype(x, theirs))


def _out_dtype(x: Tensor, theirs: bool) -> torch.dtype:
    """Under autocast torch.nn.Linear answers in autocast's dtype, bitsandbytes' in its input's."""
    in_autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if in_autocast and not theirs else x.dtype


def _summed(layer: Any, names: list[str]) -> tuple[Tensor, Tensor, float]:
    parts = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names]
    if len(parts) == 1:
        return parts[0]
    a = torch.cat([a for a, _, _ in parts])
    return a, torch.cat([b * scale for _, b, scale in parts], dim=1), 1.0


def _rate(layer: Any, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0


def _variant(layer: Any, names: list[str]) -> bool:
    return any(name in layer.lora_variant for name in names)


def weight_of(layer: LoraLayer) -> Tensor:
    """The frozen weight of a LoRA layer, packed ones of bitsandbytes as ours."""
    base = layer.get_base_layer()
    return bitsandbytes.as_quantized(base) if bitsandbytes.holds(base) else base.weight


def _compute_dtype(base: Any, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype the linear runs in; None where its own forward has to say what is wrong."""
    base_dtype = getattr(base, "compute_dtype", None)  # bitsandbytes: None means the input's
    if isinstance(weight, QuantizedTensor) or torch.is_autocast_enabled(x.device.type):
        return base_dtype or x.dtype
    return x.dtype if x.dtype == weight.dtype else None


def obstacle(layer: LoraLayer) -> str | None:
    """Why this layer cannot be fused at all, or None when it can."""
    plain = plain_class(layer)
    if plain is not LoraLinear and plain.__name__ not in _BITSANDBYTES:
        return f"{plain.__module__}.{plain.__name__} is not a LoRA linear"
    base = layer.get_base_layer()
    theirs = type(base).__name__ in _BITSANDBYTES
    if replaced(layer):
        return "its forward was replaced"
    if not theirs and plain_class(base) is not nn.Linear:
        return f"its base layer is {plain_class(base).__name__}, not torch.nn.Linear"
    if getattr(base, "parametrizations", None):
        return "its base layer is parametrized"
    if base.weight.device.type == "meta":
        return "its weight is offloaded"
    for variant in layer.lora_variant.values():
        if type(variant).__name__ != "DoraLinearVariant":
            return f"adapter variant {type(variant).__name__}"
    if any(hooked(module) for module in (base, *layer.lora_A.values(), *layer.lora_B.values())):
        return "forward hooks on its parts would not run"
    if theirs:
        return bitsandbytes.obstacle(base)
    if not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2:
        return f"its weight is {base.weight.dtype}"
    return None


class FusedLinear(Fused):
    """A LoRA linear that runs ``pyft.lora_linear``, or ``pyft.lora_qkv`` for its whole group."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        layer: Any = self
        if not args and not kwargs:
            group = layer.__dict__.get("_pyft_group")
            y = None if group is None else group.take(layer, x)
            if y is None:
                y = _alone(layer, x)
            if y is not None:
                return y
        found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return found


class GroupedLinear(Fused):
    """A plain linear whose group has adapters."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch's."""
        layer: Any = self
        group: Group | None = layer._pyft_group
        y = None if group is None else group.take(layer, x)
        return super().forward(x) if y is None else y  # type: ignore[misc, no-any-return]


def _alone(layer: Any, x: Tensor) -> Tensor | None:
    given = adapted(layer, x)
    if given is None:
        return _dora(layer, x)
    weight, bias, a, b, scale, p, dtype, out_dtype = given
    norm_input = norm_input_of(x, given.rank) if dtype == x.dtype else None
    y = lora_linear(x.to(dtype), weight, a, b, scale, bias, p, norm_input=norm_input)
    return y.to(out_dtype)


def _dora(layer: Any, x: Tensor) -> Tensor | None:
    """One active DoRA adapter without dropout; None where PEFT has to run."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    if len(names) != 1 or layer.disable_adapters or layer.merged or hooked(base):
        return None
    (name,) = names
    variant = layer.lora_variant.get(name)
    a, b, weight = layer.lora_A[name], layer.lora_B[name], weight_of(layer)
    dtype = _compute_dtype(base, x, weight)
    fits = type(variant).__name__ == "DoraLinearVariant" and b.bias is None and dtype is not None
    if not fits or hooked(a) or hooked(b) or _rate(layer, name) > 0:
        return None
    scale = layer.scaling[name]
    norm = _row_norms(layer, name, weight, a.weight, b.weight, scale)
    factor = layer.lora_magnitude_vector[name].weight / norm
    y: Tensor = lora_linear(x.to(dtype), weight, a.weight, b.weight, scale) * factor.to(dtype)
    if y.requires_grad:  # a step may follow the backward
        y.register_hook(lambda _: _forget_norms(layer, name))
    return (y if base.bias is None else y + base.bias.to(y.dtype)).to(x.dtype)


def _forget_norms(layer: Any, name: str) -> None:
    layer.__dict__.get("_pyft_norms", {}).pop(name, None)


@torch.no_grad()
def _row_norms(layer: Any, name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row in fp32 [N], taken again after a backward or a change torch counts:

    ‖W‖² + 2 s (W Aᵀ) ∘ B + s² (B A Aᵀ) ∘ B, summed over R.
    """
    stored = weight.packed if isinstance(weight, QuantizedTensor) else weight
    tensors = (stored, a, b)
    counted = not any(t.is_inference() for t in tensors)
    state = [scale, *((id(t), t._version) for t in tensors)] if counted else []
    known = layer.__dict__.setdefault("_pyft_norms", {})
    if name in known and counted and known[name][0] == state:
        norms: Tensor = known[name][1]
        return norms
    wide_a, wide_b = a.float(), b.float()
    plain = weight.to(torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()
    squares = _row_squares(layer, stored, plain, counted)
    cross = lora_linear(wide_a, plain, None, None).t()  # W Aᵀ [N, R]
    gram = wide_b @ (wide_a @ wide_a.t())
    norms = (squares + ((2 * scale * cross + scale * scale * gram) * wide_b).sum(1)).sqrt()
    known[name] = (state, norms)
    return norms


def _row_squares(layer: Any, stored: Tensor, weight: Tensor, counted: bool) -> Tensor:
    """‖W‖² of each row in fp32 [N]; kept while W is as it was."""
    state = (id(stored), stored._version) if counted else None
    known = layer.__dict__.get("_pyft_row_squares")
    if known is None or state is None or known[0] != state:
        dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        known = layer.__dict__["_pyft_row_squares"] = (state, dense.square().sum(1))
    squares: Tensor = known[1]
    return squares


class Group:
    """Linears of one module that are called with the same tensor: q, k and v. The first call
    multiplies for all; the others fetch theirs.
    """

    MISSES = 3  # one after another, without ever having been fetched whole

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.pending: tuple[Any, dict[int, Tensor]] = (None, {})
        self.complete = False  # whether all were ever fetched
        self.misses = 0

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """This layer's output of x; None where it has to run alone."""
        index = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if index is None or (self.misses >= self.MISSES and not self.complete):
            return None  # a copy made for another device; linears not called with one tensor
        of, waiting = self.pending
        now = _circumstances(x)
        if of is not None and of[0] is x and of[1:] == now and index in waiting:
            y = waiting.pop(index)
            if not waiting:
                self.pending, self.complete = (None, {}), True
            return y
        if waiting:
            self.misses += 1
        self.pending = (None, {})
        ys = self._run(x)
        if ys is None:
            return None
        self.pending = ((x, *now), {i: y for i, y in enumerate(ys) if i != index})
        return ys[index]

    def _run(self, x: Tensor) -> list[Tensor] | None:
        given = [adapted(layer, x) for layer in self.layers]
        linears = [entry for entry in given if entry is not None]
        if len(linears) != len(given):
            return None
        rates = {entry.dropout_p for entry in linears if entry.lora_a is not None}
        if len({(entry.dtype, entry.out_dtype) for entry in linears}) != 1 or len(rates) > 1:
            return None
        first = linears[0]
        ranks = sum(entry.rank for entry in linears)
        norm_input = norm_input_of(x, ranks) if first.dtype == x.dtype else None
        q, k, v = (entry.projection for entry in linears)
        p = rates.pop() if rates else 0.0
        ys = lora_qkv(x.to(first.dtype), q, k, v, p, norm_input=norm_input)
        return [y.to(first.out_dtype) for y in ys]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": (None, {})}


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """What else an output of x depends on."""
    if torch.compiler.is_compiling():
        return ()  # written down once, nothing comes between
    device = x.device.type
    version = None if x.is_inference() else x._version
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, chosen()
