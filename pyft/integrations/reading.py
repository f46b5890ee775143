"""Reading a quantized checkpoint through transformers: the headers of its files are checked against
the model first, then the tensors of each weight become a QuantizedTensor, one weight at a time.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from pyft.errors import UsageError
from pyft.integrations import gptq
from pyft.integrations.quantization_config import PyftConfig, layout_of
from pyft.integrations.stored import AGAIN, Build, Layout, Stored

_INTEGERS = (torch.uint8, torch.int8, torch.int32)


class Plan:
    """The quantized weights of a checkpoint: which tensors each is made of and what builds it."""

    def __init__(self, found: Layout) -> None:
        self.layout = found
        self.modules: dict[str, str] = {}  # name in the checkpoint, after renaming: in the model
        self.parts: dict[str, dict[str, Stored]] = defaultdict(dict)  # by name in the model
        self.builds: dict[str, Build] = {}

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self  # a converter is copied for each weight


class Join(WeightConverter):  # type: ignore[misc]
    """Collects the tensors of one quantized weight under the weight's name."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        # What is unpacked is unpacked on the CPU, where files are mapped: a GPU never holds both.
        unpacked = isinstance(plan.layout, gptq.Layout)
        super().__init__(list(plan.layout.names), ".weight", [_Build(plan)], force_cpu=unpacked)
        self.plan = plan

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The weight's name and which of its tensors this is, or the key itself and None."""
        module, name = _split(source_key, self.plan.layout.names)
        if module not in self.plan.modules:
            return source_key, None
        return f"{module}.weight", name


class _Build(ConversionOps):  # type: ignore[misc]
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        module = full_layer_name.removesuffix(".weight")
        tensors = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            part = self.plan.parts[module][name]
            if tensor.dtype != part.dtype:  # cast by a transformers without get_new_dtype
                tensor = part.read().to(tensor.device)
            tensors[name] = tensor
        weight = self.plan.builds[module](tensors)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


def _split(key: str, names: tuple[str, ...]) -> tuple[str, str]:
    """A key as the module and the longest of ``names`` it ends in; ("", "") where it has none."""
    ends = [name for name in names if key.endswith(name)]
    name = max(ends, key=len, default="")
    return (key.removesuffix(name), name) if name else ("", "")


def plan_of(
    stored: Mapping[str, Stored],
    model: PreTrainedModel,
    config: PyftConfig,
    conversions: list[Any],
) -> Plan:
    """Check every quantized weight of a checkpoint against the model."""
    found = layout_of(config)
    plan, meta = Plan(found), model.state_dict()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]

    def renamed(key: str, base: str | None = model.base_model_prefix) -> str:
        name: str = rename_source_key(key, renamings, converters, base, meta)[0]
        return name

    quantized = set()
    for key in stored:
        module, name = _split(renamed(key, None), found.names)
        if module and name in found.marks:
            quantized.add(module)
    seen = set()
    for key, part in stored.items():
        module, name = _split(renamed(key, None), found.names)
        if module in quantized:
            weight = renamed(f"{module}.weight")
            plan.modules[module] = weight.removesuffix(".weight")
            plan.parts[weight.removesuffix(".weight")][name] = part
        else:
            weight = renamed(key)
            if weight in meta and part.dtype in _INTEGERS and meta[weight].is_floating_point():
                raise UsageError(
                    f"{part.file}: {part}, quantized, but nothing beside it says how; {AGAIN}"
                )
        seen.add(weight)
    linears = set(linear_names(model, []))
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name in sorted(linears):  # a head may be new: transformers reports it
        inside = name.startswith(f"{model.base_model_prefix}.")
        if inside and f"{name}.weight" not in seen | tied:
            file = next((part.file for part in stored.values()), "checkpoint")
            raise UsageError(f"{file}: {name} has no weight in this checkpoint; {AGAIN}")
    if isinstance(found, gptq.Layout):
        qzeros = (parts[".qzeros"] for parts in plan.parts.values() if ".qzeros" in parts)
        plan.layout = found = dataclasses.replace(
            found, symmetric=all(map(found.all_zeros_are_8, qzeros))
        )
        config.format = found.format
    for module, parts in plan.parts.items():
        if f"{module}.weight" not in meta:
            continue  # reported by transformers as a weight the model does not have
        if module not in linears:
            kind = type(model.get_submodule(module)).__name__
            raise UsageError(
                f"{next(iter(parts.values())).file}: {module} is quantized and a {kind}; pyft "
                "reads quantized torch.nn.Linear modules only"
            )
        weight = meta[f"{module}.weight"]
        plan.builds[module] = found.check(module, parts, tuple(weight.shape), weight.dtype)
    return plan


def linear_names(model: nn.Module, left: list[str]) -> list[str]:
    """Names of the plain linears of ``model`` but those in (or inside a module in) ``left``."""
    linears = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    return [name for name in linears if not any(f".{skip}." in f".{name}." for skip in left)]
