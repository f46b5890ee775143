"""Loading a checkpoint, its weights quantized one by one through transformers' quantizer registry.

``AutoModel.from_pretrained(path, quantization_config=PyftConfig())`` works by itself; ``prepare``
is that plus adapters. transformers reads one tensor at a time from the memory-mapped safetensors
file, this quantizer packs it, and the source is let go before the next one is read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyft.errors import UsageError
from pyft.formats import BLOCK_SIZES, FORMATS
from pyft.ops.quantize import quantize
from pyft.quantized import QuantizedTensor


@register_quantization_config("pyft")
class PyftConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes: every linear but the output head or the modules named.

    Args:
        format: a name in ``pyft.formats.FORMATS``.
        block_size: elements per absmax.
        double_quant: store absmax in 8 bits.
        modules_to_not_convert: names of modules to leave; None leaves the head and what is tied to
            it.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = "pyft"
        self.format, self.block_size, self.double_quant = format, block_size, double_quant
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer("pyft")
class PyftQuantizer(HfQuantizer):
    """Packs linear weights as they are loaded; the module stays a torch.nn.Linear."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Note which parameters to quantize: the model's structure stays as it is."""
        config = self.quantization_config
        left = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        self._targets = {f"{name}.weight" for name in linear_names(model, left)}

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this parameter is packed as it is loaded."""
        return param_name in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        """What packs one parameter."""
        return _Quantize(self.quantization_config)

    def is_serializable(self) -> bool:
        """A packed model is not saved by transformers; its adapter is."""
        return False

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
            found[name] = _packed(
                weight, self.config.format, self.config.block_size, self.config.double_quant
            )
        return found


def _packed(weight: Tensor, format: str, block_size: int, double_quant: bool) -> nn.Parameter:
    return nn.Parameter(quantize(weight, format, block_size, double_quant), requires_grad=False)


def quantizable(model: PreTrainedModel) -> list[str]:
    """Names of the linears quantized by default: all but the output head and what is tied to it."""
    return linear_names(model, HfQuantizer.get_modules_to_not_convert(model))


def linear_names(model: nn.Module, left: list[str]) -> list[str]:
    """Names of the plain linears of ``model`` but those in (or inside a module in) ``left``."""
    linears = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    return [name for name in linears if not any(f".{skip}." in f".{name}." for skip in left)]


def prepare(
    path_or_model: str | Path | PreTrainedModel,
    quant: str | None = "nf4",
    lora: Any | None = None,
    dtype: torch.dtype | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A causal language model ready to fine-tune: quantized, with adapters, its linears fused.

    Args:
        path_or_model: a checkpoint directory (config.json and safetensors, sharded or not), or a
            loaded model, whose linears are then quantized in place one by one.
        quant: a format of ``pyft.formats``, or None to leave the weights as they are.
        lora: a ``peft.LoraConfig``, or None for no adapters.
        dtype: of what is not quantized and of the computation; None takes the checkpoint's.
        block_size, double_quant: as in ``pyft.quantize``.
        device: where the weights go as they are loaded; None is the CPU.

    Returns:
        The model, or the PeftModel around it, in eval mode; ``pyft.apply`` has been called on it.

    Memory: while loading, the process holds what is already packed, the tensor being packed and
    its packed form, and what the C library keeps of freed blocks (with glibc tens of MiB).

    Raises:
        UsageError: not a model directory, weights that are not safetensors, an unknown format or
            block size.
    """
    from pyft.integrations.peft import apply

    if quant is not None and quant not in FORMATS:
        raise UsageError(
            f"prepare: format {quant!r} is unknown; use one of {', '.join(FORMATS)} or None"
        )
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            f"prepare: block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if isinstance(path_or_model, PreTrainedModel):
        model = path_or_model
        if quant is not None:
            for name in quantizable(model):
                linear = model.get_submodule(name)
                if not isinstance(linear.weight, QuantizedTensor):
                    linear.weight = _packed(linear.weight, quant, block_size, double_quant)
    elif not isinstance(path_or_model, str | Path):
        raise UsageError(
            f"prepare: {type(path_or_model).__name__} is neither a checkpoint directory nor a "
            "transformers model; pass the base model and its adapters as lora=peft.LoraConfig(...)"
        )
    else:
        config = PyftConfig(quant, block_size, double_quant) if quant is not None else None
        model = load(Path(path_or_model), config, dtype, device)
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    apply(model)
    ready: nn.Module = model.eval()
    return ready


def load(
    path: Path,
    config: PyftConfig | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """``from_pretrained`` on a checkpoint directory after checking it; nothing is downloaded, no
    pickle is read.
    """
    check_checkpoint(path)
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        dtype=dtype or "auto",
        device_map={"": device} if device is not None else None,
        local_files_only=True,
        use_safetensors=True,
    )


def check_checkpoint(path: Path) -> None:
    """Raise UsageError unless ``path`` is a directory with config.json and safetensors weights."""
    if not path.exists():
        raise UsageError(
            f"model: {path} does not exist; give a directory with config.json and *.safetensors"
        )
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UsageError(
            f"model: {path} is not a model directory; it needs config.json and *.safetensors"
        )
    if not list(path.glob("*.safetensors")):
        pickled = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)
        )
        if pickled:
            raise UsageError(
                f"model: {path} holds pickled weights ({pickled[0]}), "
                "which can run code when loaded; convert them to safetensors"
            )
        raise UsageError(f"model: {path} holds no *.safetensors weights")
