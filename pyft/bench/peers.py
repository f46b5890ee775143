"""Other libraries, used where they are installed and reported with their version.

A peer is run in its own fast mode: warm, into a given buffer where it can write there, without
copies it does not need. One that fails is reported with its reason.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PACKAGES = (
    "torch", "bitsandbytes", "torchao", "peft", "transformers", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether a module is there to be imported."""
    return importlib.util.find_spec(module) is not None


def load(module: str) -> ModuleType:
    """Import a peer without what it prints about parts nobody here asked for."""
    if module in sys.modules:
        return sys.modules[module]
    with quiet():
        return importlib.import_module(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, logs and what native code writes to stderr away from the table."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(nowhere)
        os.close(stderr)
        logging.disable(disabled)


class Bnb4bit:
    """A weight quantized by bitsandbytes to nf4 or fp4, double quantization included."""

    def __init__(self, w: Tensor, format: str) -> None:
        self.functional = load("bitsandbytes.functional")
        self.packed, self.state = self.functional.quantize_4bit(
            w, blocksize=64, quant_type=format, compress_statistics=True
        )

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The weight, into ``out`` where this device's kernel can write there."""
        decoded: Tensor = self.functional.dequantize_4bit(self.packed, self.state, out=out)
        return decoded

    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ, differentiable in x."""
        y: Tensor = load("bitsandbytes").matmul_4bit(x, self.packed, quant_state=self.state)
        return y


def torchao_nf4(w: Tensor) -> Any:
    """A weight as torchao's NF4 tensor, blocks of 64 with nested scales of 256."""
    return load("torchao.quantization").NF4Tensor.from_tensor(w, 64, 256)


def torchao_linear(x: Tensor, weight: Any) -> Tensor:
    """x Wᵀ over torchao's NF4 tensor, differentiable in x."""
    y: Tensor = load("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").linear_nf4(
        x, weight
    )
    return y


def peft_lora(base: torch.nn.Module, a: Tensor, b: Tensor, scale: float) -> torch.nn.Module:
    """PEFT's LoRA layer around a frozen linear, torch's or bitsandbytes', with adapters a and b."""
    model = torch.nn.Sequential(base)
    add_peft_lora(model, {"0": (a, b)}, scale)
    return model[0]


def add_peft_lora(
    model: torch.nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> list[torch.nn.Parameter]:
    """Put PEFT's LoRA layers around the named linears of a model, in place.

    Returns:
        Copies of a and b of each, one after another: the layers' parameters.
    """
    peft: Any = load("peft")
    marked: Any = model  # transformers says so of a model whose linears are bitsandbytes'
    marked.is_loaded_in_4bit = any(hasattr(p, "quant_state") for p in model.parameters())
    rank = len(next(iter(adapters.values()))[0])
    config = peft.LoraConfig(
        r=rank, lora_alpha=scale * rank, target_modules=list(adapters), init_lora_weights=False
    )
    with quiet():
        peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    parameters = []
    for name, pair in adapters.items():
        layer: Any = model.get_submodule(name)
        for part, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            part["default"].weight = torch.nn.Parameter(value.detach().clone())
            parameters.append(part["default"].weight)
    return parameters


def torch_linear(w: Tensor) -> torch.nn.Module:
    """torch's linear over a frozen w [N, K], plain or quantized by pyft."""
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    return linear


def bnb_linear(w: Tensor, format: str) -> torch.nn.Module:
    """bitsandbytes' Linear4bit over w [N, K], the base layer of PEFT's QLoRA."""
    nn = load("bitsandbytes.nn")
    n, k = w.shape
    linear: torch.nn.Module = nn.Linear4bit(
        k, n, bias=False, compute_dtype=w.dtype, compress_statistics=True, quant_type=format
    )
    linear.weight = nn.Params4bit(
        w, requires_grad=False, quant_type=format, compress_statistics=True
    )
    moved: torch.nn.Module = linear.to(w.device)
    return moved


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module compiled by torch, for the shapes it is called with.

    A backward that keeps its graph has to be the first: one compiled for a graph used once cannot.
    """
    torch.compiler.reset()  # what was compiled before does not count against the limit
    found: Any = torch.compile(module, dynamic=False)
    wrapped: torch.nn.Module = found
    return wrapped
