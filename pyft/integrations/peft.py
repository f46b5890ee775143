"""apply and revert: a loaded model's linears, attention, norms, rotary embeddings and MLPs run
pyft's ops, in place, and back.

What a module is, is found by its structure and by what it computes, never by the model's name; a
module that is something else is left as it is, and the report says why.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from pyft.backend import select
from pyft.integrations.attention import reset_attention, set_attention
from pyft.integrations.fused import Fused, fuse, plain_class, replaced, unfuse
from pyft.integrations.linears import (
    FusedLinear,
    Group,
    GroupedLinear,
    obstacle,
    weight_of,
)
from pyft.integrations.loss import reset_loss, set_loss
from pyft.integrations.mlps import FusedMLP, gated_mlp
from pyft.integrations.norms import (
    FusedNorm,
    FusedRotary,
    kind_of_norm,
    rotary_of,
    style_of_rotary,
    with_rope,
)
from pyft.quantized import QuantizedTensor

# Where torch's DistributedDataParallel looks for parameters to leave alone.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# What attention modules call the linears that they call with one tensor.
_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))


@dataclass(frozen=True)
class Applied:
    """One module of a model: what it runs, and why when that is not pyft's fastest."""

    module: str
    runs: str
    why: str = ""


@dataclass(frozen=True)
class ApplyReport:
    """What ``pyft.apply`` did to each linear, attention, norm, rotary embedding and gated MLP of a
    model.
    """

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


def apply(model: nn.Module, recompute_mlp: bool = False) -> ApplyReport:
    """Make a loaded model run pyft's fused ops, in place.

    LoRA linears run ``pyft.lora_linear``, q, k and v of one attention ``pyft.lora_qkv``, gated MLPs
    ``pyft.lora_mlp``, norms ``pyft.rms_norm`` or ``pyft.layer_norm``, rotary embeddings
    ``pyft.rope``; each where it computes what the module did. Models whose attention is
    transformers' interface get attn_implementation="pyft". Causal models given labels take their
    loss by ``pyft.linear_cross_entropy``; their outputs' logits are made when somebody reads them,
    and the loss has no gradient in them.

    Args:
        model: a PEFT model, or any module, with plain, pyft-quantized or bitsandbytes weights.
            Calling it again looks at the model anew.
        recompute_mlp: let gated MLPs multiply gate and up again in the backward instead of keeping
            them: less memory for a third more of their matmuls.

    Returns:
        For each of these modules what it runs now, or why it was left.

    An adapter is computed in its input's dtype: PEFT's default, fp32 adapters on a bf16 base, is
    cast to bf16 for the product, while the parameters and their gradients stay fp32.
    """
    entries = [*_linears(model), *_attentions(model), *_mlps(model, recompute_mlp), *_norms(model)]
    entries += _scores(model)
    entries += _losses(model)
    entries += _experts(model)
    frozen = _quantized_names(model)
    if frozen:  # DistributedDataParallel would broadcast them, which writes
        model.__dict__[_DDP_IGNORES] = frozen
    return ApplyReport(tuple(entries))


def revert(model: nn.Module) -> None:
    """Give every module ``apply`` changed its own class back; nothing else was ever touched."""
    reset_attention(model)
    reset_loss(model)
    for module in model.modules():
        unfuse(module)
    if model.__dict__.get(_DDP_IGNORES) == _quantized_names(model):
        del model.__dict__[_DDP_IGNORES]


def is_fused(module: nn.Module) -> bool:
    """Whether this is a LoRA linear that ``apply`` has changed."""
    return isinstance(module, FusedLinear)


def _linears(model: nn.Module) -> Iterator[Applied]:
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield _linear(name, module)
        elif isinstance(module, nn.Linear) and not name.startswith(inside or "\0"):
            weight = module.weight
            runs = plain_class(module).__name__
            if isinstance(weight, QuantizedTensor):
                runs = f"pyft.lora_linear over {weight.format.name}"
            yield Applied(name, runs, "no adapter on it")


def _linear(name: str, layer: LoraLayer) -> Applied:
    if isinstance(layer.get_base_layer(), Fused):  # of a group, before it had an adapter
        unfuse(layer.get_base_layer())
    reason = obstacle(layer)
    if reason is not None:
        unfuse(layer)
        return Applied(name, f"PEFT {plain_class(layer).__name__}", reason)
    fuse(layer, FusedLinear)
    weight = weight_of(layer)
    return Applied(
        name, f"pyft.lora_linear on {select('lora_linear', weight.device)} over {_kind(weight)}",
        _slower(layer, weight),
    )  # fmt: skip


def _kind(weight: torch.Tensor) -> str:
    if isinstance(weight, QuantizedTensor):
        return weight.format.name
    return str(weight.dtype).removeprefix("torch.")


def _slower(layer: Any, weight: torch.Tensor) -> str:
    """Why a fused layer does not run at its fastest; "" when it does."""
    drops = any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in layer.lora_dropout.values())
    if layer.lora_variant:
        if drops or len(layer.active_adapters) > 1:
            return "with DoRA, dropout or several adapters run PEFT's forward"
        return "DoRA: the result is scaled in a pass of its own"
    if len(layer.active_adapters) > 1 and drops:
        return "while several adapters with dropout are active PEFT's forward runs"
    if drops and select("dropout", weight.device) == "reference":
        return "its dropout has no kernel on this device and runs the reference"
    return ""


def _attentions(model: nn.Module) -> Iterator[Applied]:
    for name, module in model.named_modules():
        children = dict(module.named_children())
        names = next((names for names in _QKV if set(names) <= children.keys()), None)
        if names is not None:
            entry = _group(f"{name}.{'+'.join(names)}", [children[child] for child in names])
            if entry is not None:
                yield entry
        function = rotary_of(module)
        if function is not None and not replaced(module):
            style = style_of_rotary(function)
            if style is None:
                why = f"{function.__module__}.{function.__name__} computes something else"
                yield Applied(name, f"the rotary embedding of {plain_class(module).__name__}", why)
            else:
                fuse(module, FusedRotary)
                with_rope(plain_class(module))
                pairs = "interleaved" if style.interleaved else "halves"
                yield Applied(f"{name} rotary embedding", f"pyft.rope ({pairs})")


def _group(name: str, layers: list[Any]) -> Applied | None:
    """Make q, k and v one; None where there is nothing to fuse."""
    adapters = [layer for layer in layers if is_fused(layer)]
    for layer in layers:
        if is_fused(layer):
            fuse(layer, FusedLinear, group=None)
        else:
            unfuse(layer)
    if not adapters:
        return None
    why = _apart(layers, adapters)
    if why:
        return Applied(name, "one linear each", why)
    group = Group(layers)
    for layer in layers:
        fuse(layer, FusedLinear if is_fused(layer) else GroupedLinear, group=group)
    return Applied(name, f"pyft.lora_qkv on {select('lora_qkv', weight_of(adapters[0]).device)}")


def _apart(layers: list[Any], adapters: list[Any]) -> str:
    """Why q, k and v cannot be one; "" when they can."""
    if any(not is_fused(layer) and plain_class(layer) is not nn.Linear for layer in layers):
        return "not each of them is a linear that can be fused"
    if any(layer.lora_variant for layer in adapters):
        return "DoRA scales each of them"
    if len({layer.in_features for layer in layers}) > 1:
        return "their inputs differ"
    return ""


def _mlps(model: nn.Module, recompute: bool) -> Iterator[Applied]:
    for name, module in model.named_modules():
        gated = gated_mlp(module)
        if gated is None:
            continue
        linears = [getattr(module, child) for child in gated[:3] if child is not None]
        adapters = [linear for linear in linears if isinstance(linear, LoraLayer)]
        why = _unfit(module, linears, adapters)
        if why:
            unfuse(module)
            yield Applied(name, plain_class(module).__name__, why)
            continue
        if not adapters and not any(isinstance(m.weight, QuantizedTensor) for m in linears):
            yield Applied(name, plain_class(module).__name__, "no adapter on it")
            continue
        fuse(module, FusedMLP, gated=gated, recompute=recompute)
        device = (weight_of(adapters[0]) if adapters else linears[0].weight).device
        yield Applied(name, f"pyft.lora_mlp on {select('lora_mlp', device)} ({gated.activation})")


def _unfit(module: nn.Module, linears: list[Any], adapters: list[Any]) -> str:
    """Why a gated MLP cannot be one; "" when it can."""
    if replaced(module):
        return "its forward was replaced"
    if any(obstacle(layer) is not None or layer.lora_variant for layer in adapters):
        return "an adapter on it is not a fused LoRA linear, or is DoRA's"
    others = {plain_class(linear) for linear in linears if linear not in adapters}
    if others - {nn.Linear}:
        return "not each of its linears is torch's or a LoRA linear"
    return ""


def _norms(model: nn.Module) -> Iterator[Applied]:
    tails = _tails(model)
    for name, module in model.named_modules():
        kind = kind_of_norm(module)
        if kind is None:
            if _seems_norm(module):
                why = "it computes something else than RMSNorm or LayerNorm"
                yield Applied(name, plain_class(module).__name__, why)
            continue
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        op = "layer_norm" if kind == "layer" else "rms_norm"
        fuse(module, FusedNorm, kind=kind, tail=tails.get(weight.shape[0], 0))
        yield Applied(name, f"pyft.{op} on {select('norm', weight.device)}")


def _seems_norm(module: nn.Module) -> bool:
    return "Norm" in plain_class(module).__name__ and next(module.children(), None) is None


def _tails(model: nn.Module) -> dict[int, int]:
    """Features of a norm's output -> the most ranks that linears of one module put beside it."""
    found: dict[int, int] = {}
    for module in model.modules():
        ranks: Counter[int] = Counter()
        for layer in module.children():
            if is_fused(layer) and isinstance(weight_of(layer), QuantizedTensor):  # type: ignore[arg-type]
                active: Any = layer
                names = [name for name in active.active_adapters if name in active.lora_A]
                ranks[active.in_features] += sum(active.r[name] for name in names)
        for features, rank in ranks.items():
            found[features] = max(found.get(features, 0), rank)
    return found


def _scores(model: nn.Module) -> Iterator[Applied]:
    for name, module, why in set_attention(model):
        if why:
            yield Applied(name, f"{module.config._attn_implementation} attention", why)
        else:
            device = next(module.parameters()).device
            yield Applied(f"{name} attention", f"pyft.attention on {select('attention', device)}")


def _losses(model: nn.Module) -> Iterator[Applied]:
    for name, _, runs, why in set_loss(model):
        yield Applied(f"{name} loss".strip(), runs, why)


def _experts(model: nn.Module) -> Iterator[Applied]:
    for name, module in model.named_modules():
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            why = "experts in one parameter are not fused"
            yield Applied(name, plain_class(module).__name__, why)


def _quantized_names(model: nn.Module) -> list[str]:
    parameters = model.named_parameters()
    return [name for name, weight in parameters if isinstance(weight, QuantizedTensor)]
