"""apply on whole models: each architecture's own numbers, every fusion runs, and all is undone."""

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON
from peft import get_peft_model
from test_peft import adapted, assert_steps_equal, config, differs_from_peft, logits, step, tokens
from torch import Tensor, nn

import pyft
from pyft.integrations import linears, mlps, norms
from pyft.integrations.peft import ApplyReport, is_fused
from pyft.quantized import QuantizedTensor

LAYERS = COMMON["num_hidden_layers"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE, TURNED = "pyft.rope (halves)", "pyft.rope (interleaved)"
QKV, RMS, LAYER = "pyft.lora_qkv on cpu", "pyft.rms_norm on cpu", "pyft.layer_norm on cpu"
ATTENTION = "pyft.attention on cpu"


def mlp(activation: str = "silu") -> str:
    return f"pyft.lora_mlp on cpu ({activation})"


# configuration, options -> what each layer runs, norms after the last layer not counted
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Granite": ({}, {QKV: 1, ROPE: 1, mlp(): 1, RMS: 2}),
    "Olmo2": ({}, {QKV: 1, ROPE: 1, mlp(): 1, RMS: 4}),
    "SmolLM3": ({}, {QKV: 1, ROPE: 1, mlp(): 1, RMS: 2}),
    "Gemma": ({}, {QKV: 1, ROPE: 1, mlp("gelu_tanh"): 1, RMS: 2}),
    "Gemma2": ({"query_pre_attn_scalar": 16}, {QKV: 1, ROPE: 1, mlp("gelu_tanh"): 1, RMS: 4}),
    "Mixtral": ({"num_local_experts": 4}, {QKV: 1, ROPE: 1, RMS: 2}),
    "Qwen3Moe": (EXPERTS, {QKV: 1, ROPE: 1, RMS: 4}),
    "Qwen2Moe": (
        EXPERTS | {"shared_expert_intermediate_size": 48}, {QKV: 1, ROPE: 1, mlp(): 1, RMS: 2},
    ),
    "Phi3": ({"partial_rotary_factor": 0.5}, {ROPE: 1, mlp(): 1, RMS: 2}),
    "Cohere": ({}, {QKV: 1, TURNED: 1, mlp(): 1, LAYER: 1}),
    "Glm": ({}, {QKV: 1, TURNED: 1, mlp(): 1, RMS: 2}),
    "StableLm": ({}, {QKV: 1, ROPE: 1, mlp(): 1, LAYER: 2}),
    "Starcoder2": ({}, {QKV: 1, ROPE: 1, LAYER: 2}),
    "GPTNeoX": ({}, {ROPE: 1, LAYER: 2}),
    "Olmo": ({}, {QKV: 1, ROPE: 1, mlp(): 1}),
    "Nemotron": ({}, {QKV: 1, ROPE: 1}),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, {QKV: 1, RMS: 2}),
}  # fmt: skip
LEFT = {
    "Mixtral": {"experts in one parameter are not fused"},
    "Olmo": {"it computes something else than RMSNorm or LayerNorm"},
    "GptOss": {
        "experts in one parameter are not fused",
        "transformers.models.gpt_oss.modeling_gpt_oss.apply_rotary_pos_emb computes something else",
    },
}


def model_of(name: str) -> nn.Module:
    """With adapters on its attention and dense MLPs; norms' weights are not all alike."""
    options, _ = MODELS[name]
    made = getattr(transformers, f"{name}Config")(**(COMMON | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made)
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or ("norm" in key.lower() and key.endswith("weight")):
                parameter.data += 0.1 * torch.randn_like(parameter)
        return get_peft_model(model.eval(), config())


def fused_parts(report: ApplyReport) -> dict[str, int]:
    runs = (entry.runs for entry in report.modules)
    return dict(Counter(run for run in runs if run.startswith("pyft") and "linear" not in run))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_own_numbers(name: str) -> None:
    model, ids = model_of(name), tokens()
    before = step(model, ids)
    report = pyft.apply(model)
    _, expected = MODELS[name]
    counts = {run: count * LAYERS for run, count in expected.items()}
    for run in (RMS, LAYER):
        if run in counts:
            counts[run] += 1  # the last
    assert fused_parts(report) == counts | {ATTENTION: 1}
    whys = {entry.why for entry in report.modules}
    assert LEFT.get(name, set()) <= whys
    assert_steps_equal(step(model, ids), before, 1e-5)
    pyft.revert(model)
    after = step(model, ids)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(key.startswith("_pyft") for m in model.modules() for key in m.__dict__)


@contextmanager
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each op is called inside the block."""
    seen: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        return counted

    places = (
        (linears, "lora_linear"), (linears, "lora_qkv"), (mlps, "lora_mlp"), (norms, "rms_norm"),
        (norms, "layer_norm"), (norms, "rope"),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, counting(name, getattr(module, name)))
        yield seen


def test_each_fusion_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    with calls(monkeypatch) as seen:
        step(model, ids)
    once = {"lora_linear": LAYERS, "lora_qkv": LAYERS, "lora_mlp": LAYERS, "rope": LAYERS}
    assert seen == once | {"rms_norm": 2 * LAYERS + 1}


def test_adapters_on_q_and_v_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(target_modules=["q_proj", "v_proj"]), tokens()
    before = step(model, ids)
    assert fused_parts(pyft.apply(model))[QKV] == LAYERS
    with calls(monkeypatch) as seen:
        assert_steps_equal(step(model, ids), before)
    assert seen["lora_qkv"] == LAYERS
    assert seen["lora_linear"] == 0
    keys = [type(module) for name, module in model.named_modules() if name.endswith("k_proj")]
    pyft.revert(model)
    assert all(issubclass(key, nn.Linear) and key is not nn.Linear for key in keys)
    after = [type(module) for name, module in model.named_modules() if name.endswith("k_proj")]
    assert after == [nn.Linear] * LAYERS


class Crossed(nn.Module):
    """q of one tensor, k and v of another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(0)
        found: Tensor = self.q_proj(x) + self.k_proj(other) * self.v_proj(other)
        return found


def test_q_k_and_v_of_different_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Crossed(), config(task_type=None))
    x = torch.randn(5, 8)
    expected = model(x)
    pyft.apply(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    with calls(monkeypatch) as seen:
        model(x)
    assert seen == {"lora_linear": 3}


@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_on_the_linears_of_an_mlp_run(recompute: bool) -> None:
    model, ids = adapted(), tokens()
    expected = logits(model, ids)
    pyft.apply(model, recompute_mlp=recompute)
    seen: list[int] = []
    gates = [module for name, module in model.named_modules() if name.endswith("gate_proj")]
    handles = [gate.register_forward_hook(lambda *_: seen.append(1)) for gate in gates]
    torch.testing.assert_close(logits(model, ids), expected)
    assert len(seen) == LAYERS
    for handle in handles:
        handle.remove()
    logits(model, ids)
    assert len(seen) == LAYERS


def kept(model: nn.Module, ids: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, QuantizedTensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(found.values())
    del loss
    return total


def test_what_a_model_keeps_for_its_backward() -> None:
    model, ids = adapted(), torch.randint(3, 4096, (2, 64))
    model.train()
    stock = kept(model, ids)
    pyft.apply(model)
    fused = kept(model, ids)
    pyft.apply(model, recompute_mlp=True)
    least = kept(model, ids)
    m, i = 128 * 4, COMMON["intermediate_size"]
    assert fused < stock - LAYERS * m * i  # not act(gate) up, among others
    assert fused - least == LAYERS * 2 * m * i  # gate and up


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing(reentrant: bool, recompute: bool) -> None:
    model, ids = adapted(), tokens()
    model.train()
    before = step(model, ids)
    pyft.apply(model, recompute_mlp=recompute)
    model.enable_input_require_grads()
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert_steps_equal(step(model, ids), before)


def test_autocast() -> None:
    model, ids = adapted(), torch.randint(3, 4096, (4, 40))
    exact = step(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, ids)
    pyft.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused = step(model, ids)

    def error(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].float() - exact[name]).norm())

    assert fused["logits"].dtype == stock["logits"].dtype
    ratios = [error(fused, name) / error(stock, name) for name in exact]
    assert sum(ratios) / len(ratios) <= 1.02
    assert max(ratios) <= 1.3


@pytest.mark.parametrize("seen", [False, True])
def test_compiled_as_one_graph(seen: bool) -> None:
    model, ids = adapted(), tokens()
    before = step(model, ids)
    pyft.apply(model)
    if seen:
        step(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_steps_equal(step_of(compiled, model, ids), before)


def step_of(callable_model: Any, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = callable_model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    named = model.named_parameters()
    gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_is_fused_and_its_own(copied: str) -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    expected = logits(model, ids)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert sum(map(is_fused, other.modules())) == sum(map(is_fused, model.modules()))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(other, ids), expected)


def test_inference_mode() -> None:
    model, ids = adapted(), tokens()
    expected = logits(model, ids)
    pyft.apply(model)
    with torch.inference_mode():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    generated = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    stock = copy_without(model).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, stock)


def test_two_adapters_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(), tokens()
    model.add_adapter("second", config(r=3, lora_alpha=6))
    model.base_model.set_adapter(["default", "second"])
    pyft.apply(model)
    with calls(monkeypatch) as seen:
        assert differs_from_peft(model, ids) < 1e-5
    assert seen["lora_qkv"] == LAYERS
    before = step(copy_without(model), ids)
    assert_steps_equal(step(model, ids), before)


def copy_without(model: nn.Module) -> nn.Module:
    reverted = copy.deepcopy(model)
    pyft.revert(reverted)
    return reverted


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_takes_its_norms_once_a_step(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(use_dora=True, target_modules=["o_proj"]), tokens()
    if quantized:
        for name, module in model.named_modules():
            if name.endswith("o_proj.base_layer"):
                q = pyft.quantize(module.weight)
                module.weight = nn.Parameter(q, requires_grad=False)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module) is nn.Linear and isinstance(module.weight, QuantizedTensor):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    pyft.apply(model)
    with calls(monkeypatch) as seen:
        found = step(model, ids)
        assert_steps_equal(found, step(plain, ids))
        assert seen["lora_linear"] == 2 * LAYERS  # the linear, and W Aᵀ for the norms
        logits(model, ids)  # a step may have followed the backward
        assert seen["lora_linear"] == 4 * LAYERS
        logits(model, ids)
        assert seen["lora_linear"] == 5 * LAYERS
        for each in (model, plain):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1)
            optimizer.step()
        assert_steps_equal(step(model, ids), step(plain, ids))
        for each in (model, plain):  # as an optimizer of another library writes: uncounted
            for parameter in each.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(1.1)
        assert_steps_equal(step(model, ids), step(plain, ids))


def test_frozen_a_keeps_no_input() -> None:
    """LoRA-FA: with A frozen, dB needs S alone."""
    model, ids = adapted(), torch.randint(3, 4096, (2, 64))
    pyft.apply(model)
    whole = kept(model, ids)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert kept(model, ids) < whole
    before = step(copy_without(model), ids)
    assert_steps_equal(step(model, ids), before)


@pytest.mark.slow
def test_training_follows_stock_peft(checkpoint: Any) -> None:
    """200 steps of a 4-layer model in fp32: the losses agree to 1e-4 at every step."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        options = COMMON | {"num_hidden_layers": 4}
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options))
        stock = get_peft_model(model, config(init_lora_weights=True))
        fused = copy.deepcopy(stock)
        batches = [torch.randint(3, 4096, (4, 32)) for _ in range(8)]
    pyft.apply(fused)
    losses: list[list[float]] = []
    for each in (stock, fused):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for index in range(200):
            ids = batches[index % len(batches)]
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    for expected, found in zip(*losses, strict=True):
        assert abs(found - expected) <= 1e-4 * expected
    assert losses[0][-1] < losses[0][0] - 0.1  # something was learned
    pyft.revert(fused)
    assert {type(module) for module in fused.modules()} == {type(m) for m in stock.modules()}
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    assert torch.equal(logits(fused, batches[0]), logits(stock, batches[0]))


class Scaled(nn.Module):
    """Writes to what its norm returned before its linear reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(self.norm(x).mul_(3.0))
        return found


def test_a_norm_s_output_that_is_written_to() -> None:
    model = get_peft_model(Scaled(), config(task_type=None, target_modules=["linear"]))
    x = torch.randn(5, 8)
    leaves = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    assert fused_parts(pyft.apply(model)) == {RMS: 1}
    found = torch.autograd.grad(model(x).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
