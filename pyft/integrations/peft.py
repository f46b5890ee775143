"""apply and revert: LoRA linears of a loaded PEFT model run pyft's ops, in place, and back.

A PEFT layer is fused by giving the module a subclass of its own class whose forward calls
``pyft.lora_linear``; every parameter, hook and method stays PEFT's, so saving, merging, switching
and disabling adapters work as before. What a layer is asked to do that the op does not (several
active adapters, a DoRA variant, a merged adapter) goes to PEFT's forward.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pyft.backend import select
from pyft.integrations import bitsandbytes
from pyft.ops.lora_linear import lora_linear
from pyft.quantized import QuantizedTensor

# Where torch's DistributedDataParallel looks for parameters to leave alone.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")  # PEFT's classes over bitsandbytes' linears


@dataclass(frozen=True)
class Applied:
    """One module of a model: what it runs, and why when that is not pyft's fastest."""

    module: str
    runs: str
    why: str = ""


@dataclass(frozen=True)
class ApplyReport:
    """What ``pyft.apply`` did to each linear of a model."""

    modules: tuple[Applied, ...]

    @property
    def fused(self) -> int:
        """How many LoRA linears run pyft's op."""
        return sum(entry.runs.startswith("pyft.lora_linear") for entry in self.modules)

    def __str__(self) -> str:
        groups = Counter((entry.runs, entry.why) for entry in self.modules)
        lines = [
            f"{n:5d} x {runs}" + (f" ({why})" if why else "") for (runs, why), n in groups.items()
        ]
        return (
            "\n".join(lines) or "no linear modules found: nothing to fuse, the model runs as it was"
        )


def apply(model: nn.Module) -> ApplyReport:
    """Make the LoRA linears of a loaded model run ``pyft.lora_linear``, in place.

    Args:
        model: a PEFT model, or any module that contains PEFT LoRA layers, with plain, pyft-
            quantized or bitsandbytes weights. Calling it again changes nothing.

    Returns:
        For each linear of the model what it runs now, or why it was left.

    The adapter is computed in its input's dtype: PEFT's default, fp32 adapters on a bf16 base, is
    cast to bf16 for the product, while the parameters and their gradients stay fp32.
    """
    entries = []
    inside = {
        f"{name}.base_layer"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    adapters = {
        f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            entries.append(_apply_layer(name, module))
        elif (
            isinstance(module, nn.Linear)
            and name not in inside
            and not name.startswith(tuple(adapters) or "\0")
        ):
            weight = module.weight
            runs = type(module).__name__
            if isinstance(weight, QuantizedTensor):
                runs = f"pyft.lora_linear over {weight.format.name}"
            entries.append(Applied(name, runs, "no adapter on it"))
    frozen = _quantized_names(model)
    if frozen:  # DistributedDataParallel would broadcast them, which writes
        model.__dict__[_DDP_IGNORES] = frozen
    return ApplyReport(tuple(entries))


def revert(model: nn.Module) -> None:
    """Give every module ``apply`` changed its own class back; nothing else was ever touched."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = type(module).plain
    if model.__dict__.get(_DDP_IGNORES) == _quantized_names(model):
        del model.__dict__[_DDP_IGNORES]


def _quantized_names(model: nn.Module) -> list[str]:
    parameters = model.named_parameters()
    return [name for name, weight in parameters if isinstance(weight, QuantizedTensor)]


def _apply_layer(name: str, layer: LoraLayer) -> Applied:
    reason = _obstacle(layer)
    if reason is not None:
        return Applied(name, f"PEFT {type(layer).__name__}", reason)
    if not isinstance(layer, _Fused):
        plain: Any = type(layer)
        layer.__class__ = _fused_class(plain)
    weight = _weight(layer)
    kind = (
        weight.format.name
        if isinstance(weight, QuantizedTensor)
        else str(weight.dtype).removeprefix("torch.")
    )
    why = ""
    if len(layer.active_adapters) > 1:
        why = "while several adapters are active PEFT's forward runs"
    elif select("dropout", weight.device) == "reference" and _drops(layer):
        why = "its dropout has no kernel on this device and runs the reference"
    return Applied(
        name, f"pyft.lora_linear on {select('lora_linear', weight.device)} over {kind}", why
    )


def _obstacle(layer: LoraLayer) -> str | None:
    """Why this layer cannot be fused at all, or None when it can."""
    plain = type(layer).plain if isinstance(layer, _Fused) else type(layer)
    if plain is not LoraLinear and plain.__name__ not in _BITSANDBYTES:
        return f"{plain.__module__}.{plain.__name__} is not a LoRA linear"
    base = layer.get_base_layer()
    if plain is LoraLinear and type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}, not torch.nn.Linear"
    if getattr(base, "parametrizations", None):
        return "its base layer is parametrized"
    if base.weight.device.type == "meta":
        return "its weight is offloaded"
    if layer.lora_variant:
        return f"adapter variant {type(next(iter(layer.lora_variant.values()))).__name__}"
    if any(b.bias is not None for b in layer.lora_B.values()):
        return "its adapter has a bias (lora_bias=True)"
    if any(_hooked(module) for module in (base, *layer.lora_A.values(), *layer.lora_B.values())):
        return "forward hooks on its parts would not run"
    if plain.__name__ in _BITSANDBYTES:
        return bitsandbytes.obstacle(base)
    if not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2:
        return f"its weight is {base.weight.dtype}"
    return None


def _drops(layer: LoraLayer) -> bool:
    return any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in layer.lora_dropout.values())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _weight(layer: LoraLayer) -> Tensor:
    base = layer.get_base_layer()
    return bitsandbytes.as_quantized(base) if bitsandbytes.holds(base) else base.weight


class _Fused:
    """The forward of a fused layer; mixed in before the layer's own class, kept in ``plain``."""

    plain: type

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        if (
            args
            or kwargs
            or layer.disable_adapters
            or layer.merged
            or len(adapters) != 1
            or layer.lora_variant
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        name = adapters[0]
        base, lora_a, lora_b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
        # What may have changed since apply: an adapter with a bias, hooks, a weight bitsandbytes
        # has repacked.
        changed = lora_b.bias is not None or any(_hooked(part) for part in (base, lora_a, lora_b))
        theirs = bitsandbytes.holds(base)
        if changed or (theirs and bitsandbytes.obstacle(base)):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        weight = _weight(layer)
        dtype = _compute_dtype(layer, x, weight)
        if dtype is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        dropout = layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
        scale = layer.scaling[name]
        y = lora_linear(x.to(dtype), weight, lora_a.weight, lora_b.weight, scale, base.bias, p)
        # Under autocast torch.nn.Linear answers in autocast's dtype, bitsandbytes' in its input's.
        in_autocast = torch.is_autocast_enabled(x.device.type)
        return y if in_autocast and not theirs else y.to(x.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the name of the layer's own class: the fused one is made where it is read."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_fused, (type(self).plain,), *reduced[2:])


def _compute_dtype(layer: Any, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype the linear runs in; None where PEFT's forward has to say what is wrong."""
    base_dtype = getattr(
        layer.get_base_layer(), "compute_dtype", None
    )  # bitsandbytes: None means the input's
    if isinstance(weight, QuantizedTensor) or torch.is_autocast_enabled(x.device.type):
        return base_dtype or x.dtype
    return x.dtype if x.dtype == weight.dtype else None


def _new_fused(plain: type) -> Any:
    fused: Any = _fused_class(plain)
    return fused.__new__(fused)


@cache
def _fused_class(plain: type) -> type:
    return type(f"Fused{plain.__name__}", (_Fused, plain), {"plain": plain, "__module__": __name__})


def is_fused(module: nn.Module) -> bool:
    """Whether ``apply`` has changed this module."""
    return isinstance(module, _Fused)
