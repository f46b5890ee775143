"""Kernel parity of a run: the fused ops of the trained model against the reference, on one real
batch.

For the first layer of each kind (q_proj, down_proj, ...) that the batch runs through, its input and
output gradient are recorded; the fused op, the reference in the same dtype and the reference in
float64 (the truth) then run on them. Fused layers that text never reaches, such as those of a
vision tower, are left out. A quantity passes when

    max|fused - truth| <= 2 max|reference - truth| + 4 ulp of its largest value
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import pyft
from pyft.backend import select
from pyft.finetune.loop import token_mean_loss
from pyft.quantized import QuantizedTensor

ROWS = 256  # rows of the batch a layer is compared on: float64 is slow
ULPS = 4


def parity(loaded: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Compare one fused LoRA linear of each kind; see the module. ``batch`` is int64 [B, S]
    tensors, as in training.

    Returns rows {"op", "module", "backend", "quantity", "max_error", "allowed", "passed"}; empty
    when no fused layer ran.
    """
    from pyft.integrations.peft import is_fused

    layers = {name: module for name, module in loaded.model.named_modules() if is_fused(module)}
    if not layers:
        return []
    device = next(loaded.model.parameters()).device
    with _recording(layers) as records:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        outputs = loaded.model(**inputs, use_cache=False)
        token_mean_loss(outputs, labels).backward()
    loaded.model.zero_grad(set_to_none=True)
    rows = []
    for name in (name for name in layers if name in records):
        x, dy = records[name]
        for quantity, error, allowed in _compare(layers[name], x, dy):
            backend = select("lora_linear", x.device)
            found = {"op": "lora_linear", "module": name, "backend": backend, "quantity": quantity}
            rows.append(
                {**found, "max_error": error, "allowed": allowed, "passed": error <= allowed}
            )
    return rows


@contextmanager
def _recording(layers: dict[str, Any]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record input rows and the gradient of output rows of the first layer of each kind that runs.

    The kind of a layer is the last part of its name. Filled by a forward and backward inside.
    """
    records: dict[str, tuple[Tensor, Tensor]] = {}
    seen = set()

    def hook(name: str) -> Callable[..., None]:
        kind = name.rpartition(".")[2]

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if kind in seen or not output.requires_grad:
                return
            seen.add(kind)
            x = args[0].detach().flatten(0, -2)[:ROWS].clone()
            output.register_hook(
                lambda dy: records.__setitem__(name, (x, dy.flatten(0, -2)[:ROWS].clone()))
            )

        return remember

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _compare(layer: Any, x: Tensor, dy: Tensor) -> Iterator[tuple[str, float, float]]:
    base = layer.get_base_layer()
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(x.dtype).to(dtype)

        weight = base.weight.detach()
        if dtype == torch.float64:
            dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            weight = cast(dense)
        inputs = [cast(tensor).requires_grad_() for tensor in (x, a, b)]
        bias = None if base.bias is None else cast(base.bias)
        with pyft.backend(backend):
            x_, a_, b_ = inputs
            y = pyft.lora_linear(x_, weight, a_, b_, layer.scaling[name], bias)
            return [y.detach(), *torch.autograd.grad(y, inputs, cast(dy))]

    results = (run("auto", x.dtype), run("reference", x.dtype), run("reference", torch.float64))
    for quantity, fused, reference, truth in zip(("y", "dX", "dA", "dB"), *results, strict=True):
        ulp = torch.finfo(x.dtype).eps * truth.abs().max().item()
        allowed = 2 * (reference - truth).abs().max().item() + ULPS * ulp
        yield quantity, (fused - truth).abs().max().item(), allowed
