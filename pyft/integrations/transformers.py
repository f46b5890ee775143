"""Loading a checkpoint: quantized while it is read, or already quantized and read as it is.

``AutoModelForCausalLM.from_pretrained(path, quantization_config=PyftConfig())`` works by itself
once this module is imported; ``prepare`` is that plus adapters, and reads what other libraries have
quantized. transformers reads one tensor at a time from the memory-mapped safetensors file, the
quantizer packs it, and the source is let go before the next one is read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

import pyft.integrations.attention  # noqa: F401 (registers attn_implementation="pyft")
from pyft.errors import UsageError
from pyft.integrations.quantization_config import READ, PyftConfig, config_of_source
from pyft.integrations.quantizer import PyftQuantizer, packed
from pyft.integrations.reading import linear_names
from pyft.integrations.stored import AGAIN, of_files, read_json, shards
from pyft.ops.quantize import check_format
from pyft.quantized import QuantizedTensor

__all__ = ["PyftConfig", "check_checkpoint", "load", "prepare", "quantizable"]


def quantizable(model: PreTrainedModel) -> list[str]:
    """Names of the linears quantized by default: all but the output head and what is tied to it."""
    return linear_names(model, HfQuantizer.get_modules_to_not_convert(model))


def prepare(
    path_or_model: str | Path | PreTrainedModel,
    quant: str | None = "nf4",
    lora: Any | None = None,
    dtype: torch.dtype | None = None,
    block_size: int | str | None = None,
    double_quant: bool | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A causal language model ready to fine-tune: quantized, with adapters, its linears fused.

    Args:
        path_or_model: a checkpoint directory (config.json and safetensors, sharded or not), or a
            loaded model, whose linears are then quantized in place one by one. Weights stored
            quantized by pyft, by bitsandbytes (nf4, fp4, LLM.int8) or in 4 bits by GPTQ or AWQ are
            read as they are: no bit of bitsandbytes' changes, the other two become int4_zp or int4.
        quant: a format of ``pyft.formats``, or None to leave the weights as they are.
        lora: a ``peft.LoraConfig``, or None for no adapters.
        dtype: of what is not quantized and of the computation; None takes the checkpoint's.
        block_size, double_quant: as in ``pyft.quantize``; None takes the format's own.
        device: where the weights go as they are loaded; None is the CPU.

    Returns:
        The model, or the PeftModel around it, in eval mode; ``pyft.apply`` has been called on it.
        ``save_pretrained`` of the model stores the weights quantized, bitsandbytes' in its layout;
        ``PyftConfig.layout`` says how to choose.

    Memory: while loading, the process holds what is already packed, the tensor being packed and
    its packed form, and what the C library keeps of freed blocks (with glibc tens of MiB). Weights
    stored as pyft holds them stay in the mapped file on the CPU.

    Raises:
        UsageError: not a model directory, weights that are not safetensors, an unknown format or
            block size, tensors of a quantized checkpoint that do not fit.
    """
    from pyft.integrations.peft import apply

    config = None
    if quant is not None:
        check_format("prepare", quant, block_size, double_quant)
        config = PyftConfig(quant, block_size, double_quant)
    if isinstance(path_or_model, PreTrainedModel):
        model = path_or_model
        if config is not None:
            _quantize_in_place(model, config)
    elif not isinstance(path_or_model, str | Path):
        raise UsageError(
            f"prepare: {type(path_or_model).__name__} is neither a checkpoint directory nor a "
            "transformers model; pass the base model and its adapters as lora=peft.LoraConfig(...)"
        )
    else:
        path, chosen = Path(path_or_model), (block_size, double_quant) != (None, None)
        check_checkpoint(path)
        if chosen and _source_of(path) is not None:
            raise UsageError(
                f"prepare: {path} is quantized already and read as it is; leave block_size and "
                "double_quant out"
            )
        model = load(path, config, dtype, device)
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    apply(model)
    ready: nn.Module = model.eval()
    return ready


def _quantize_in_place(model: PreTrainedModel, config: PyftConfig) -> None:
    for name in quantizable(model):
        linear = model.get_submodule(name)
        if not isinstance(linear.weight, QuantizedTensor):
            linear.weight = packed(linear.weight, config)
    if getattr(model, "hf_quantizer", None) is None:  # save_pretrained asks it for the weights
        model.hf_quantizer = PyftQuantizer(config, pre_quantized=False)
        model.is_quantized, model.quantization_method = True, config.quant_method
        model.hf_quantizer.postprocess_model(model)


def load(
    path: Path,
    config: PyftConfig | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """``from_pretrained`` on a checkpoint directory after checking it; nothing is downloaded, no
    pickle is read. ``config`` is for weights that are not quantized yet.
    """
    check_checkpoint(path)
    of_files(shards(path))
    source, options = _source_of(path), {}
    if source is not None and (config is not None or source.get("quant_method") in READ):
        model_config = AutoConfig.from_pretrained(path, local_files_only=True)
        model_config.quantization_config = vars(_stored_config(path, source, config))
        config, options = None, {"config": model_config}
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        dtype=dtype or "auto",
        device_map={"": device} if device is not None else None,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers has given them random values
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"model: {path} has no {missing[0]}{more}; {AGAIN}")
    return model


def _source_of(path: Path) -> dict[str, Any] | None:
    """The quantization_config in a checkpoint's config.json."""
    source = read_json(path / "config.json").get("quantization_config")
    if source is not None and not isinstance(source, dict):
        raise UsageError(
            f"{path / 'config.json'}: quantization_config is {source!r}, not an object; remove it, "
            "or fetch the checkpoint again"
        )
    return source


def _stored_config(path: Path, source: dict[str, Any], asked: PyftConfig | None) -> PyftConfig:
    """How to read a quantized checkpoint, where that is what was asked for."""
    where, method = f"{path / 'config.json'}: quantization_config", source.get("quant_method")
    if method not in READ:
        raise UsageError(
            f"{where}: {method!r} is not a quantization pyft reads ({', '.join(READ)}); use the "
            "16-bit model, or quant=None to load it as transformers does"
        )
    found = config_of_source(source, where)
    fitting = {"nf4", found.format}  # nf4 is what is asked for where nothing is
    if method in ("gptq", "awq"):
        fitting |= {"int4", "int4_zp"}  # which of the two, its zero points tell
    if asked is not None and asked.format not in fitting:
        raise UsageError(
            f"prepare: {path} is quantized already, in {found.format}; leave quant out to read it, "
            f"or give the 16-bit model to quantize it in {asked.format}"
        )
    return found


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
