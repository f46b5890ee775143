"""pyft: fine-tuning on small GPUs. Public names; each is imported when it is first used."""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.backend import availability, backend
from pyft.errors import PyftError, UsageError

if TYPE_CHECKING:
    from pyft import losses, optim
    from pyft.integrations.peft import apply, revert
    from pyft.integrations.sdpa import scaled_dot_product_attention
    from pyft.integrations.transformers import prepare
    from pyft.ops.attention import attention
    from pyft.ops.chunked_attention import chunked_attention
    from pyft.ops.dropout import dropout
    from pyft.ops.glu import geglu, relu2, swiglu
    from pyft.ops.linear_cross_entropy import linear_cross_entropy
    from pyft.ops.linear_logprobs import linear_logprobs
    from pyft.ops.lora_linear import lora_linear
    from pyft.ops.lora_mlp import lora_mlp
    from pyft.ops.lora_qkv import lora_qkv
    from pyft.ops.norm import layer_norm, rms_norm
    from pyft.ops.quantize import dequantize, quantize
    from pyft.ops.rope import rope
    from pyft.ops.shared.group import NormInput
    from pyft.ops.shared.head_input import Teacher
    from pyft.quantized import QuantizedTensor
    from pyft.scratch import limit_scratch

__version__ = "0.1.0"

# Imported at first use: these need torch, and `pyft --help` does not.
_LAZY = {
    "apply": "pyft.integrations.peft",
    "revert": "pyft.integrations.peft",
    "prepare": "pyft.integrations.transformers",
    "attention": "pyft.ops.attention",
    "chunked_attention": "pyft.ops.chunked_attention",
    "dropout": "pyft.ops.dropout",
    "geglu": "pyft.ops.glu",
    "relu2": "pyft.ops.glu",
    "swiglu": "pyft.ops.glu",
    "linear_cross_entropy": "pyft.ops.linear_cross_entropy",
    "linear_logprobs": "pyft.ops.linear_logprobs",
    "Teacher": "pyft.ops.shared.head_input",
    "lora_linear": "pyft.ops.lora_linear",
    "lora_mlp": "pyft.ops.lora_mlp",
    "lora_qkv": "pyft.ops.lora_qkv",
    "layer_norm": "pyft.ops.norm",
    "rms_norm": "pyft.ops.norm",
    "rope": "pyft.ops.rope",
    "scaled_dot_product_attention": "pyft.integrations.sdpa",
    "NormInput": "pyft.ops.shared.group",
    "dequantize": "pyft.ops.quantize",
    "quantize": "pyft.ops.quantize",
    "QuantizedTensor": "pyft.quantized",
    "limit_scratch": "pyft.scratch",
}
_LAZY_MODULES = ("losses", "optim")

__all__ = [
    "NormInput",
    "PyftError",
    "QuantizedTensor",
    "Teacher",
    "UsageError",
    "apply",
    "attention",
    "availability",
    "backend",
    "chunked_attention",
    "dequantize",
    "dropout",
    "geglu",
    "layer_norm",
    "limit_scratch",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "losses",
    "optim",
    "prepare",
    "quantize",
    "relu2",
    "revert",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "swiglu",
]


def _register_kernels(root: Path) -> None:
    """In a checkout the package pyft.kernels is the folder kernels/ beside this one."""
    entry = root / "kernels" / "__init__.py"
    if "pyft.kernels" in sys.modules or not (entry.is_file() and (root / "csrc/pyft.h").is_file()):
        return
    places = [str(entry.parent)]
    spec = spec_from_file_location("pyft.kernels", entry, submodule_search_locations=places)
    if spec is not None and spec.loader is not None:
        module = sys.modules["pyft.kernels"] = module_from_spec(spec)
        spec.loader.exec_module(module)
        globals()["kernels"] = module


_register_kernels(Path(__file__).resolve().parent.parent)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _LAZY_MODULES:
        return importlib.import_module(f"pyft.{name}")
    raise AttributeError(f"module 'pyft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
