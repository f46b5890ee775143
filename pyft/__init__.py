"""pyft: fine-tuning on small GPUs. Public names; each is imported when it is first used."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.backend import availability, backend
from pyft.errors import PyftError, UsageError

if TYPE_CHECKING:
    from pyft.integrations.peft import apply, revert
    from pyft.integrations.transformers import prepare
    from pyft.ops.dropout import dropout
    from pyft.ops.lora_linear import lora_linear
    from pyft.ops.quantize import dequantize, quantize
    from pyft.quantized import QuantizedTensor

__version__ = "0.1.0"

# Imported at first use: these need torch, and `pyft --help` does not.
_LAZY = {
    "apply": "pyft.integrations.peft",
    "revert": "pyft.integrations.peft",
    "prepare": "pyft.integrations.transformers",
    "dropout": "pyft.ops.dropout",
    "lora_linear": "pyft.ops.lora_linear",
    "dequantize": "pyft.ops.quantize",
    "quantize": "pyft.ops.quantize",
    "QuantizedTensor": "pyft.quantized",
}

__all__ = [
    "PyftError",
    "QuantizedTensor",
    "UsageError",
    "apply",
    "availability",
    "backend",
    "dequantize",
    "dropout",
    "lora_linear",
    "prepare",
    "quantize",
    "revert",
]

# In a checkout the package pyft.kernels is the folder kernels/ beside this one.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "__init__.py").is_file() and (_root / "csrc" / "pyft.h").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
