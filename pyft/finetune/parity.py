"""Kernel parity of a run: the fused ops of the trained model against the reference, on one real
batch.

For the first linear of each kind (q_proj, down_proj, ...) and the first gated MLP that the batch
runs through, input and output gradient are recorded; the fused op, the reference in the same dtype
and the reference in float64 (the truth) then run on them. Fused layers that text never reaches,
such as those of a vision tower, are left out. A quantity passes when

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
    """Compare one fused LoRA linear of each kind and one fused MLP; see the module. ``batch`` is
    int64 [B, S] tensors, as in training.

    Returns rows {"op", "module", "backend", "quantity", "max_error", "allowed", "passed"}; empty
    when no fused layer ran.
    """
    from pyft.integrations.linears import FusedLinear
    from pyft.integrations.mlps import FusedMLP

    fused = (FusedLinear, FusedMLP)
    layers = {
        name: module for name, module in loaded.model.named_modules() if isinstance(module, fused)
    }
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
            op = "lora_mlp" if isinstance(layers[name], FusedMLP) else "lora_linear"
            backend = select(op, x.device)
            found = {"op": op, "module": name, "backend": backend, "quantity": quantity}
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


def _compare(module: Any, x: Tensor, dy: Tensor) -> Iterator[tuple[str, float, float]]:
    run = _runs_of(module, x, dy)
    if run is None:
        return
    results = (run("auto", x.dtype), run("reference", x.dtype), run("reference", torch.float64))
    for quantity, truth in results[2].items():
        fused, reference = results[0][quantity], results[1][quantity]
        ulp = torch.finfo(x.dtype).eps * truth.abs().max().item()
        allowed = 2 * (reference - truth).abs().max().item() + ULPS * ulp
        yield quantity, (fused - truth).abs().max().item(), allowed


def _runs_of(
    module: Any, x: Tensor, dy: Tensor
) -> Callable[[str, torch.dtype], dict[str, Tensor]] | None:
    """A function of a backend and a dtype: the output and the gradients, adapters' one after
    another. None where the module does not run the op as it is, with DoRA for one.
    """
    from pyft.integrations.linears import adapted

    gated = getattr(module, "_pyft_gated", None)
    linears = [module]
    if gated is not None:
        linears = [getattr(module, name) for name in gated[:3] if name is not None]
    given = [entry for entry in (adapted(linear, x) for linear in linears) if entry is not None]
    if len(given) != len(linears):
        return None

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(x.dtype).to(dtype)

        leaves: dict[str, list[Tensor]] = {"dX": [cast(x).requires_grad_()], "dA": [], "dB": []}  # type: ignore[union-attr]
        projections = []
        for linear in given:
            weight, bias, a, b, scale = linear.projection
            if dtype == torch.float64:
                dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                weight = cast(dense)
            adapter = [cast(part) for part in (a, b)]
            for name, part in zip(("dA", "dB"), adapter, strict=True):
                if part is not None:
                    leaves[name].append(part.requires_grad_())
            projections.append((weight, cast(bias), *adapter, scale))
        with pyft.backend(backend):
            (of_x,) = leaves["dX"]
            if gated is None:
                weight, bias, a, b, scale = projections[0]
                y = pyft.lora_linear(of_x, weight, a, b, scale, bias)
            else:
                up = projections[1] if len(projections) == 3 else None
                y = pyft.lora_mlp(of_x, projections[0], up, projections[-1], gated.activation)
            wanted = [leaf for group in leaves.values() for leaf in group]
            found = iter(torch.autograd.grad(y, wanted, cast(dy)))
        gradients = {name: [next(found) for _ in group] for name, group in leaves.items()}
        together = {k: torch.cat([g.flatten() for g in v]) for k, v in gradients.items() if v}
        return {"y": y.detach(), **together}

    return run
