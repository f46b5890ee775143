"""What one decoder layer keeps for its backward, and a whole step's peak, traced on fake tensors.

    python benchmarks/layer_memory.py [--tokens 2048] [--layers 32] [--json FILE]

No GPU and no memory is needed: Llama-3.1-8B with NF4 weights and rank-16 adapters on all linears is
made of fake tensors, and its step is run on them, as PEFT runs it and after ``pyft.apply``.

The ideal, in bytes a token of one layer, with 16-bit activations, hidden size D, intermediate size
I, Hq and Hkv heads of size d, seven adapters of rank R:

    the input of either norm, which is the residual stream      2 (2 D)
    q, k and v as the attention takes them, and its output      2 (2 Hq d + 2 Hkv d)
    the attention's log-sum-exp                                 4 Hq
    gate and up, unless they are multiplied again               2 (2 I)
    the adapters' inputs S                                      2 (7 R)
    1 / root mean square of either norm                         4 (2)

Stock attention keeps k and v repeated for every query head, and a mask, beside that.
"""

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import pyft
from pyft.quantized import QuantizedTensor

RANK = 16
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
Change = Callable[[nn.Module], object]
WAYS: dict[str, Change] = {
    "peft": lambda model: None,
    "pyft": pyft.apply,
    "pyft, gate and up again": lambda model: pyft.apply(model, recompute_mlp=True),
}


def configuration(layers: int) -> LlamaConfig:
    """Llama-3.1-8B's."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        attn_implementation="sdpa",
    )  # fmt: skip


def ideal(config: LlamaConfig, recompute: bool) -> int:
    """Bytes a token of one layer: see the module."""
    heads = config.num_attention_heads + config.num_key_value_heads
    gate_and_up = 0 if recompute else 4 * config.intermediate_size
    of_norms = 4 * config.hidden_size + 8
    attention = 4 * heads * config.head_dim + 4 * config.num_attention_heads
    return of_norms + attention + gate_and_up + 14 * RANK


class Live(TorchDispatchMode):
    """Follows the bytes of live storages and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not isinstance(leaf, QuantizedTensor):
                self.follow(leaf)
        return found


def fake_model(layers: int) -> nn.Module:
    """On fake tensors of the current mode, base weights in NF4."""
    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(layers))
        lora = LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            made = torch.empty(parameter.shape, dtype=torch.bfloat16)
            if name.endswith("base_layer") and key == "weight":
                made = pyft.quantize(made, "nf4")
            module._parameters[key] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=torch.float32)
    return model.train()


def kept_by_a_layer(way: str, tokens: int) -> float:
    """Bytes a token that one layer keeps between forward and backward."""
    kept: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layers in (1, 2):
            model = fake_model(layers)
            _outside(lambda model=model: WAYS[way](model))
            found = _storages_kept(model, tokens)
            kept.append(sum(found.values()))
    return (kept[1] - kept[0]) / tokens


def _storages_kept(model: nn.Module, tokens: int) -> dict[int, int]:
    weights = {p.untyped_storage()._cdata for p in _plain(model)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, QuantizedTensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                found[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        hidden = model.base_model.model.model(inputs_embeds=embedded, use_cache=False)
    del hidden
    return found


def _plain(model: nn.Module) -> list[Tensor]:
    """The tensors weights are stored in."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        is_packed = isinstance(parameter, QuantizedTensor)
        found += parameter.parts() if is_packed else [parameter]
    return found


def peak_of_a_step(way: str, tokens: int, layers: int) -> dict[str, float]:
    """GiB of weights, and of the peak of a step with checkpointed layers and AdamW."""
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(layers)
        _outside(lambda: WAYS[way](model))
        for tensor in _plain(model):
            live.follow(tensor)
        weights = live.now
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, foreach=False)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    return {"weights_gib": weights / 2**30, "peak_gib": live.peak / 2**30}


def _outside(function: Callable[[], object]) -> None:
    """Run with real tensors: what a module computes is found out on a few numbers."""
    with torch.utils._python_dispatch._disable_current_modes():
        function()


def main() -> None:
    """Print the table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description="activation memory of Llama-3.1-8B, traced")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = configuration(options.layers)
    rows = []
    for way in WAYS:
        kept = kept_by_a_layer(way, options.tokens)
        least = ideal(config, recompute="again" in way)
        step = peak_of_a_step(way, options.tokens, options.layers)
        rows.append({"way": way, "bytes_per_token_and_layer": kept, "ideal": least, **step})
        print(
            f"{way:24s} keeps {kept:9,.0f} bytes a token and layer, ideal {least:9,} "
            f"({kept / least:.3f}); weights {step['weights_gib']:.2f} GiB, "
            f"peak of a step {step['peak_gib']:.2f} GiB"
        )
    if options.json is not None:
        setting = {"tokens": options.tokens, "layers": options.layers, "rank": RANK}
        versions = {"torch": torch.__version__, "pyft": pyft.__version__}
        found = {"model": "Llama-3.1-8B", **setting, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
