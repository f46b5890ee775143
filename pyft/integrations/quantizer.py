"""The quantizer transformers finds under "pyft": it packs or reads linear weights as a model is
loaded, and stores them as they are when it is saved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from pyft.errors import UsageError
from pyft.integrations import bitsandbytes, layout
from pyft.integrations.quantization_config import PyftConfig, bitsandbytes_source
from pyft.integrations.reading import Join, linear_names, plan_of
from pyft.integrations.stored import of_files
from pyft.ops.quantize import quantize
from pyft.quantized import QuantizedTensor


@register_quantizer("pyft")
class PyftQuantizer(HfQuantizer):
    """Packs or reads linear weights as they are loaded; the module stays a torch.nn.Linear."""

    requires_calibration = False
    quantization_config: PyftConfig
    _targets: frozenset[str] = frozenset()
    _loading: Any = None

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note which parameters are quantized: the model's structure stays as it is."""
        config = self.quantization_config
        left = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        self._targets = frozenset(f"{name}.weight" for name in linear_names(model, left))
        self._loading = (model, checkpoint_files or [])

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this parameter is packed as it is loaded."""
        return param_name in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        """What packs one parameter."""
        return _Quantize(self.quantization_config)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Check the tensors of a quantized checkpoint, and add what reads them; nothing large has
        been read when this raises UsageError.
        """
        if not self.pre_quantized:
            return weight_conversions
        model, files = self._loading
        plan = plan_of(of_files(files), model, self.quantization_config, weight_conversions)
        return [*weight_conversions, Join(plan)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Stored tensors keep their dtype, whatever the model's."""
        return (
            None if isinstance(converter, Join) else super().get_new_dtype(converter, param, dtype)
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Saving is ``get_state_dict_and_metadata``'s; frozen weights stay frozen when moved."""
        self._loading = None
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [each for each in conversions if type(each) is not Join]
        config = self.quantization_config
        for weight in model.parameters():
            if isinstance(weight, QuantizedTensor):
                weight.requires_grad_(False)
                if bitsandbytes_source(config):  # its entry names no block size
                    config.format, config.double_quant = weight.format.name, weight.double_quant
                    config.block_size = "row" if config.format == "int8" else weight.block_size

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` stores: each quantized weight as the tensors of the layout."""
        config, found = self.quantization_config, dict(model.state_dict())
        if config.layout == "bitsandbytes":
            written = (config.format, config.double_quant, model.dtype, _unquantized(model))
            config._entry = bitsandbytes_source(config) or bitsandbytes.config_of(*written)
        for name, weight in list(found.items()):
            if isinstance(weight, QuantizedTensor):
                del found[name]
                found |= self._stored(name, weight)
        return found, {}

    def _stored(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        config, prefix = self.quantization_config, name.removesuffix("weight")
        if config.layout == "bitsandbytes":
            storage = (bitsandbytes_source(config) or {}).get("bnb_4bit_quant_storage", "uint8")
            return bitsandbytes.save(weight, prefix, getattr(torch, storage))
        size = weight.shape[-1] if config.block_size == "row" else config.block_size
        said = (config.format, size, config.double_quant)
        held = (weight.format.name, weight.block_size, weight.double_quant)
        if held != said:
            raise UsageError(
                f"save: {name} is {'{} in blocks of {}, double_quant {}'.format(*held)}, the "
                f"model's quantization_config says {'{}, {}, {}'.format(*said)}; "
                "quantize all weights alike"
            )
        return layout.save(weight, prefix)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it train."""
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, config: PyftConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        found = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            found[name] = packed(weight, self.config)
        return found


def packed(weight: Tensor, config: PyftConfig) -> nn.Parameter:
    """A quantized parameter, frozen."""
    settings = (config.format, config.block_size, config.double_quant)
    return nn.Parameter(quantize(weight, *settings), requires_grad=False)


def _unquantized(model: nn.Module) -> list[str]:
    """Names of the modules bitsandbytes would quantize that are not."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module.weight, QuantizedTensor)
    ]
