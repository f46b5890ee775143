"""The model and tokenizer of a job: loaded from a directory, quantized, adapted, fused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyft.errors import UsageError
from pyft.finetune.config import Config
from pyft.integrations.peft import ApplyReport, apply
from pyft.integrations.transformers import PyftConfig, check_checkpoint, load, quantizable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Loaded:
    """A model ready to train; ``applied`` says what each linear runs (None for method full)."""

    model: Any
    tokenizer: Any
    architecture: str
    applied: ApplyReport | None


def load_tokenizer(path: Path, weights: Path | None = None) -> Any:
    """The tokenizer in ``path``, a checkpoint directory or an adapter of the one in ``weights``.

    Raises UsageError when the checkpoint is none, or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    check_checkpoint(weights or path)
    if weights is not None and not (path / "tokenizer_config.json").is_file():
        path = weights
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"model: {path} has no tokenizer that can be read ({_first_line(error)}); "
            "put its tokenizer.json and tokenizer_config.json there"
        ) from None


def load_model(config: Config) -> Loaded:
    """The model of ``config`` on its device: quantized under qlora, with adapters, fused.

    Raises UsageError for a directory that is not a model, an architecture transformers does not
    know, targets that name no layer, or method qlora where no layer can be quantized.
    """
    tokenizer = load_tokenizer(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantize = PyftConfig(config.quant) if config.method == "qlora" else None
    model = load_base(config.model, quantize, compute_dtype(config.dtype), device)
    architecture = type(model).__name__
    if config.method == "full":
        model.requires_grad_(True)
        return Loaded(model, tokenizer, architecture, None)
    if quantize is not None and not quantizable(model):
        raise UsageError(
            f"model: {architecture} has no torch.nn.Linear layer to quantize; take --method lora"
        )
    adapted = add_adapters(model, config).to(device)
    return Loaded(adapted, tokenizer, architecture, apply(adapted))


def load_base(path: Path, quantize: PyftConfig | None, dtype: torch.dtype, device: str) -> Any:
    """The bare model; what transformers cannot load becomes a UsageError of one line."""
    check_checkpoint(path)
    try:
        return load(path, quantize, dtype, device)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"model: {path} cannot be loaded: {_first_line(error)}") from error


def add_adapters(model: nn.Module, config: Config) -> nn.Module:
    """LoRA adapters in fp32 on the layers of ``config.targets``."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted: nn.Module = get_peft_model(model, lora)
    except ValueError as error:
        raise UsageError(
            f"targets: {config.targets!r} fits no layer: {_first_line(error)}"
        ) from None
    return adapted


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of frozen weights and activations; "auto" is the narrowest that is native.

    On a GPU that is bf16 from Ampere on and fp16 before; on a CPU bf16 with AMX or AVX512_BF16,
    else fp32.
    """
    if name != "auto":
        return DTYPES[name]
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
