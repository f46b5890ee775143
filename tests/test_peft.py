"""pyft.apply and revert: PEFT's own numbers, PEFT's own files, and everything put back."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ARCHITECTURES, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pyft
from pyft.integrations.peft import ApplyReport, is_fused
from pyft.quantized import QuantizedTensor

NAMES = list(ARCHITECTURES)
LOSS, TRL = "pyft.linear_cross_entropy on cpu", "TRL's trainers keep their own loss"
LAYERS = 2


def config(**options: Any) -> LoraConfig:
    """Adapters on every linear, with B random: an untouched B would hide the adapter."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(defaults | {"init_lora_weights": False} | options))


def adapted(name: str = "llama", **options: Any) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(build_model(name), config(**options)).eval()


def tokens() -> Tensor:
    return torch.randint(3, 4096, (2, 9))


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits and the gradient of every trainable parameter."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return {"logits": output.logits.detach(), **gradients}


def assert_steps_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max()
        assert (value - expected[name]).abs().max() <= tolerance * max(scale, 1e-3), name


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def entries(report: ApplyReport) -> dict[str, Any]:
    return {entry.module: entry for entry in report.modules}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    model, ids = adapted(name), tokens()
    classes = {n: type(m) for n, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = step(model, ids)
    report = pyft.apply(model)
    linears = LAYERS * ARCHITECTURES[name].linears
    assert report.fused == linears
    assert sum(is_fused(module) for module in model.modules()) == linears
    runs = Counter(entry.runs for entry in report.modules if entry.runs.startswith("pyft"))
    expected = ARCHITECTURES[name]
    assert runs == {
        "pyft.lora_linear on cpu over float32": linears,
        f"pyft.lora_mlp on cpu ({expected.activation})": LAYERS,
        "pyft.rope (halves)": LAYERS,
        "pyft.rms_norm on cpu": LAYERS * expected.norms + 1,
        "pyft.attention on cpu": 1,
        LOSS: 1,
        **({"pyft.lora_qkv on cpu": LAYERS} if expected.qkv else {}),
    }
    assert all(entry.why == "" for entry in report.modules if entry.runs in runs.keys() - {LOSS})
    assert entries(report)["base_model.model.lm_head"].why == "no adapter on it"
    assert str(report).splitlines()[0].split(" x ")[0].strip() == str(linears)
    assert_steps_equal(step(model, ids), before)
    pyft.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    after = step(model, ids)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_fused_over_nf4(name: str) -> None:
    """Against PEFT over the same weights decoded."""
    model = adapted(name)
    plain = copy.deepcopy(model)
    for (path, module), (_, other) in zip(
        model.named_modules(), plain.named_modules(), strict=True
    ):
        if path.endswith("base_layer"):
            q = pyft.quantize(module.weight)
            module.weight = nn.Parameter(q, requires_grad=False)
            other.weight = nn.Parameter(q.dequantize(), requires_grad=False)
    report, ids = pyft.apply(model), tokens()
    assert report.fused == LAYERS * ARCHITECTURES[name].linears
    assert {e.runs for e in report.modules if "lora_linear" in e.runs} == {
        "pyft.lora_linear on cpu over nf4"
    }
    assert_steps_equal(step(model, ids), step(plain, ids))


def test_apply_twice_changes_nothing_more() -> None:
    model, ids = adapted(), tokens()
    first, once = pyft.apply(model), logits(model, ids)
    assert pyft.apply(model) == first
    assert torch.equal(logits(model, ids), once)
    pyft.revert(model)
    pyft.revert(model)
    assert not any(is_fused(module) for module in model.modules())


def test_a_model_without_adapters() -> None:
    model = build_model("llama")
    report = pyft.apply(model)
    assert report.fused == 0
    assert Counter((entry.runs, entry.why) for entry in report.modules) == {
        ("Linear", "no adapter on it"): LAYERS * 7 + 1,
        ("LlamaMLP", "no adapter on it"): LAYERS,
        ("pyft.rope (halves)", ""): LAYERS,
        ("pyft.rms_norm on cpu", ""): LAYERS * 2 + 1,
        ("pyft.attention on cpu", ""): 1,
        (LOSS, f"output head and loss, logits on request; {TRL}"): 1,
    }
    assert "nothing to fuse" in str(pyft.apply(nn.Sequential(nn.ReLU())))


def differs_from_peft(model: PeftModel, ids: Tensor) -> float:
    """Largest difference of the fused model's logits from PEFT's, relative to their size."""
    fused = logits(model, ids)
    reverted = copy.deepcopy(model)
    pyft.revert(reverted)
    assert not any(is_fused(module) for module in reverted.modules())
    expected = logits(reverted, ids)
    return float((fused - expected).abs().max() / expected.abs().max())


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "rslora": ({"use_rslora": True}, 14, ""),
    "dora": ({"use_dora": True}, 14, "DoRA: the result is scaled in a pass of its own"),
    "lora_bias": ({"lora_bias": True}, 14, ""),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"k_proj": 7}}, 14, ""),
    "dropout": ({"lora_dropout": 0.5}, 14, ""),
    "some layers": ({"target_modules": ["q_proj", "v_proj"]}, 4, ""),
    "one layer": ({"layers_to_transform": [1]}, 7, ""),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, 3, ""),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 2, ""),
    "embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]}, 2,
        "peft.tuners.lora.layer.Embedding is not a LoRA linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    options, fused, why = VARIANTS[variant]
    if "layers_to_transform" in options:
        targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        options = options | {"layers_pattern": "layers", "target_modules": targets}
    model, ids = adapted(**options), tokens()
    before = step(model, ids)
    report = pyft.apply(model)
    assert report.fused == fused
    whys = {e.why for e in report.modules if "lora_linear" in e.runs or "PEFT" in e.runs}
    assert whys - {"", "no adapter on it"} == ({why} if why else set())
    assert_steps_equal(step(model, ids), before)
    assert differs_from_peft(model, ids) < 1e-4


def test_gpt2_is_left_with_a_reason_and_runs() -> None:
    model, ids = adapted("gpt2", fan_in_fan_out=True), tokens()
    before = step(model, ids)
    report = pyft.apply(model)
    assert report.fused == 0
    left = [entry for entry in report.modules if entry.runs.startswith("PEFT")]
    assert len(left) == 8
    assert {entry.why for entry in left} == {"its base layer is Conv1D, not torch.nn.Linear"}
    assert_steps_equal(step(model, ids), before)
    assert {e.runs for e in report.modules if "ln_" in e.module} == {"pyft.layer_norm on cpu"}


def test_a_subclass_of_linear_is_left() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(3, 8)
    before = model(x)
    report = pyft.apply(model)
    assert report.fused == 1
    assert "its base layer is Doubled, not torch.nn.Linear" in {
        entry.why for entry in report.modules
    }
    torch.testing.assert_close(model(x), before)


def test_disabled_adapters() -> None:
    model, ids = adapted(), tokens()
    base = logits(build_model("llama"), ids)
    pyft.apply(model)
    tuned = logits(model, ids)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), base)
    assert torch.equal(logits(model, ids), tuned)
    assert (tuned - base).abs().max() > 0.1


def test_merge_and_unmerge() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    tuned = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), tuned, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), tuned, atol=2e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    assert not any(is_fused(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, ids), tuned, atol=2e-4, rtol=1e-4)


def test_unload() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    base = model.unload()
    pyft.revert(base)
    assert torch.equal(logits(base, ids), logits(build_model("llama"), ids))


def test_several_adapters() -> None:
    model, ids = adapted(), tokens()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.add_adapter("second", config(r=3, target_modules=["q_proj", "down_proj"]))
    expected = {}
    for active in ("default", "second"):
        model.set_adapter(active)
        expected[active] = logits(model, ids)
    pyft.apply(model)
    for active in ("default", "second", "default"):
        model.set_adapter(active)
        torch.testing.assert_close(logits(model, ids), expected[active], atol=1e-4, rtol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    report = pyft.apply(model)
    assert report.fused == LAYERS * 7
    assert differs_from_peft(model, ids) < 1e-5
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, ids), expected["default"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["lora_bias", "use_dora", "use_rslora"])
def test_an_adapter_added_after_apply(option: str) -> None:
    """What apply could not see then must not be dropped now."""
    model, ids = adapted(), tokens()
    pyft.apply(model)
    model.add_adapter("second", config(**{option: True}))
    model.set_adapter("second")
    for name, parameter in model.named_parameters():
        if "lora_B.second.bias" in name:
            nn.init.normal_(parameter)
    assert differs_from_peft(model, ids) < 1e-4


def test_mixed_adapters_in_one_batch() -> None:
    model, ids = adapted(), tokens()
    model.add_adapter("second", config())
    names = ["default", "second"]
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=names).logits
        pyft.apply(model)
        found = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(found, expected)


def calls_of(module: nn.Module) -> list[str]:
    """Names its forward hooks append to when they run."""
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    return seen


@pytest.mark.parametrize("when", ["before apply", "after apply"])
@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_on_the_parts_run(part: str, when: str) -> None:
    model, ids = adapted(), tokens()
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    if when == "after apply":
        pyft.apply(model)
    seen = calls_of(layer.get_submodule(part))
    if when == "before apply":
        report = pyft.apply(model)
        assert report.fused == 13
        assert "forward hooks on its parts would not run" in {e.why for e in report.modules}
    logits(model, ids)
    assert seen == ["hook"]


def test_hooks_on_the_layer_run() -> None:
    model = adapted()
    pyft.apply(model)
    seen = calls_of(next(module for module in model.modules() if is_fused(module)))
    logits(model, tokens())
    assert seen == ["hook"]


def test_dropout_is_drawn_in_training_only() -> None:
    model, ids = adapted(lora_dropout=0.5), tokens()
    pyft.apply(model)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(2)
    first, second = logits(model, ids), logits(model, ids)
    torch.manual_seed(2)
    assert torch.equal(logits(model, ids), first)
    assert not torch.equal(first, second)
    model.eval()
    assert differs_from_peft(model, ids) < 1e-4


def test_dropout_keeps_the_mean() -> None:
    """Averaged over many masks a layer's output is the one without dropout."""
    layer = nn.Sequential(nn.Linear(64, 8))
    options = {"target_modules": ["0"], "init_lora_weights": False, "lora_dropout": 0.5}
    model = get_peft_model(layer, LoraConfig(**options))
    pyft.apply(model)
    x = torch.randn(1, 64)
    with torch.no_grad():
        exact = model.eval()(x)
        drawn = model.train()(x.expand(20_000, 64))
    error = (drawn.mean(0) - exact[0]).abs()
    assert (error < 5 * drawn.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, ids = adapted(lora_dropout=0.3), tokens()
    pyft.apply(model)
    model.enable_input_require_grads()
    model.train()
    torch.manual_seed(5)
    expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    assert_steps_equal(step(model, ids), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_fp32_adapters(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(build_model("llama").to(dtype), config()).eval()
    ids = tokens()
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    pyft.apply(model)
    found = step(model, ids)
    pyft.revert(model)
    expected = step(model, ids)
    assert found["logits"].dtype == dtype
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        error = (value.float() - expected[name].float()).norm() / expected[name].float().norm()
        assert error < 40 * torch.finfo(dtype).eps, name


def test_autocast() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, ids)
        pyft.revert(model)
        expected = step(model, ids)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert (value - expected[name]).norm() / expected[name].norm() < 0.1, name


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapter_reloads_in_stock_peft(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, ids = checkpoint(name), tokens()
    model = pyft.prepare(path, quant=None, lora=config())
    expected = logits(model, ids)
    assert any(map(is_fused, model.modules()))
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(path)
    keys = set(peft.utils.load_peft_weights(tmp_path))
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}
    loaded = PeftModel.from_pretrained(stock, tmp_path).eval()
    assert not any(map(is_fused, loaded.modules()))
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-4, rtol=0)


def test_a_few_steps_of_training_follow_peft() -> None:
    ids = tokens()
    losses: dict[bool, list[float]] = {}
    for fused in (False, True):
        model = adapted()
        if fused:
            pyft.apply(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[fused] = []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fused].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < losses[True][0]


def test_no_base_weight_is_trained() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    step(model, ids)
    parameters = dict(model.named_parameters())
    assert all(
        parameters[n].grad is None and torch.equal(parameters[n], p) for n, p in before.items()
    )


def test_deepcopy_stays_fused() -> None:
    model, ids = adapted(), tokens()
    pyft.apply(model)
    other = copy.deepcopy(model)
    assert any(map(is_fused, other.modules()))
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_a_fused_model_pickles() -> None:
    """torch.save of a whole model, and processes that are spawned."""
    model, ids = adapted(), tokens()
    pyft.apply(model)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_weights_of_another_dtype_are_left() -> None:
    model = adapted()
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.float8_e4m3fn), False)
    report = pyft.apply(model)
    assert report.fused == 13
    assert "its weight is torch.float8_e4m3fn" in {entry.why for entry in report.modules}


def test_quantized_weight_shows_in_the_report_without_an_adapter() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].weight = nn.Parameter(pyft.quantize(model[0].weight), requires_grad=False)
    assert isinstance(model[0].weight, QuantizedTensor)
    (entry,) = pyft.apply(model).modules
    assert (entry.module, entry.runs, entry.why) == (
        "0",
        "pyft.lora_linear over nf4",
        "no adapter on it",
    )


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_distributed_data_parallel(quant: str | None, tmp_path: Path) -> None:
    """One process over gloo: constructing DDP broadcasts parameters, which a packed one refuses."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = pyft.prepare(build_model("llama"), quant=quant, lora=config()).train()
        ids = tokens()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(input_ids=ids, labels=ids).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        expected = step(model, ids)
    finally:
        torch.distributed.destroy_process_group()
    assert found
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    before = set(vars(build_model("llama")))
    pyft.revert(model)
    assert "_ddp_params_and_buffers_to_ignore" not in {*vars(model)} - before


@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_answers_in_the_dtype_peft_answers_in(quantized: bool) -> None:
    base = nn.Linear(64, 32)
    if quantized:
        base.weight = nn.Parameter(pyft.quantize(base.weight.detach()), requires_grad=False)
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"]))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).dtype
        pyft.apply(model)
        assert model(x).dtype == expected == torch.bfloat16


def test_prepare_refuses_what_it_cannot_prepare() -> None:
    with pytest.raises(pyft.UsageError, match="PeftModelForCausalLM is neither"):
        pyft.prepare(adapted())
