"""How many kernels one decoder layer calls, forward and backward, and what a call costs the host.

    python benchmarks/layer_calls.py [--tokens 512]

Counted on a CPU, where every torch op that computes something and every kernel of ours is one call,
as each is one launch on a GPU; views and allocations are not counted. The layer is Llama-3.2-1B's
with NF4 weights and rank-16 adapters on all linears; PEFT's is over the same weights in bf16, for
which it calls the fewest. The host's time is that of a layer too small to compute anything.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import pyft
from pyft import native

NOT_COUNTED = (
    "view", "reshape", "transpose", "slice", "split", "select", "detach", "expand", "unsqueeze",
    "as_strided", "alias", "empty", "narrow", "resize", "aten::t", "permute", "to", "chunk",
    "result_type", "lift", "item", "zeros", "ones", "squeeze", "clone", "contiguous", "matmul",
    "linear", "pad", "scaled_dot_product_attention", "unbind", "set_", "is_", "rsub", "_to_copy",
    "resolve_conj",
)  # fmt: skip
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def layers(hidden: int, intermediate: int, tokens: int) -> dict[str, Callable[[], None]]:
    """A step of the layer as each runs it."""
    heads = max(4, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=heads // 4, head_dim=hidden // heads, attn_implementation="sdpa",
    )  # fmt: skip
    base = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    quantized = copy.deepcopy(base)
    for module in quantized.modules():
        if isinstance(module, nn.Linear):
            packed = pyft.quantize(module.weight.data, "nf4")
            module.weight = nn.Parameter(packed, requires_grad=False)
    found = {}
    for name, layer in (("peft", base), ("pyft", quantized)):
        made = inject_adapter_in_model(LoraConfig(r=16, target_modules=TARGETS), layer)
        for key, parameter in made.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.to(torch.bfloat16)
        if name == "pyft":
            pyft.apply(made)
        found[name] = _step(made.train(), x, angles)
    return found


def _step(layer: nn.Module, x: Tensor, angles: tuple[Tensor, Tensor]) -> Callable[[], None]:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> None:
        y = layer(x.detach().requires_grad_(), position_embeddings=angles)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(x)
        for parameter in parameters:
            parameter.grad = None

    return run


def calls(step: Callable[[], None]) -> int:
    """Torch's computing ops and our kernels in one step."""
    ours = 0
    launch = native._launch

    def counted(*arguments: object) -> None:
        nonlocal ours
        ours += 1
        launch(*arguments)  # type: ignore[arg-type]

    step()
    native._launch = counted  # type: ignore[assignment]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as record:
            step()
    finally:
        native._launch = launch
    events = (e for e in record.events() if e.name.startswith("aten::"))
    return ours + sum(_computes(event.name) for event in events)


def _computes(name: str) -> bool:
    short = name.removeprefix("aten::")
    return not any(
        short == word or (word in name and word not in ("to", "t")) for word in NOT_COUNTED
    )


def host_time(steps: dict[str, Callable[[], None]], rounds: int = 200) -> dict[str, float]:
    """Median milliseconds of a step, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[rounds // 10 :]) for name, values in times.items()}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description="kernel calls of one decoder layer")
    parser.add_argument("--tokens", type=int, default=512)
    tokens = parser.parse_args().tokens
    counted = {name: calls(step) for name, step in layers(2048, 8192, tokens).items()}
    torch.set_num_threads(1)
    host = host_time(layers(64, 128, 4))
    for name, count in counted.items():
        print(f"{name}: {count} calls forward and backward, {host[name]:.2f} ms of the host")


if __name__ == "__main__":
    main()
