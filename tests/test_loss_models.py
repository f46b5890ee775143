"""pyft.apply's loss in whole models: transformers' own numbers, no logits until they are read."""

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON, build_model
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_peft import config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import pyft
from pyft.errors import UsageError
from pyft.integrations.lazy_logits import HeadCall, LazyLogits
from pyft.integrations.loss import set_loss

Step = tuple[float, dict[str, Tensor], Any]
RUNS = "pyft.linear_cross_entropy on cpu"
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
    "Granite": {"logits_scaling": 3.0},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "Qwen3": {"tie_word_embeddings": True},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mpt": {},
    "Mamba": {},
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HeadCall]]:
    """The heads' calls whose logits were made after all."""
    calls: list[HeadCall] = []
    output = HeadCall.output

    def noted(call: HeadCall, *args: Any) -> Tensor:
        calls.append(call)
        return output(call, *args)

    monkeypatch.setattr(HeadCall, "output", noted)
    return calls  # type: ignore[return-value]


def model_of(name: str) -> Any:
    made = getattr(transformers, f"{name}Config")(**(COMMON | MODELS[name]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(made).eval()


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 4096, (rows, length))


def labelled(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, : ids.shape[1] // 2] = -100
    return labels


def step(model: nn.Module, ids: Tensor, **options: Any) -> Step:
    """The loss and the gradient of every parameter that has one, and the outputs."""
    model.zero_grad()
    outputs = model(**({"input_ids": ids, "labels": labelled(ids)} | options))
    outputs.loss.backward()
    named = model.named_parameters()
    return outputs.loss.item(), {n: p.grad for n, p in named if p.grad is not None}, outputs


def assert_same(found: Step, expected: Step, tolerance: float = 1e-5) -> None:
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert (found[1][name] - gradient).abs().max() <= tolerance * scale, name


def fused_loss(model: nn.Module) -> str:
    """What the report says of a model whose loss alone is fused."""
    (entry,) = set_loss(model)
    return entry[2]


@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_cross_entropy_of_models(name: str, made: list[HeadCall]) -> None:
    model, ids = build_model("gpt2") if name == "gpt2" else model_of(name), tokens()
    expected = step(copy.deepcopy(model), ids)
    assert fused_loss(model) == RUNS
    found = step(model, ids)
    assert_same(found, expected)
    assert isinstance(found[2].logits, LazyLogits)
    assert not made
    assert torch.equal(found[2].logits, expected[2].logits)
    assert len(made) == 1
    given = model(input_ids=ids, labels=labelled(ids), num_items_in_batch=torch.tensor(50)).loss
    items = expected[0] * int((labelled(ids)[:, 1:] != -100).sum()) / 50
    if name != "Mixtral":  # to whose loss the routers' is added
        torch.testing.assert_close(given.item(), items, rtol=1e-5, atol=0)
    pyft.revert(model)
    again = step(model, ids)
    assert type(again[2].logits) is Tensor
    assert_same(again, expected, 0)


def test_cross_entropy_is_in_apply_s_report() -> None:
    model, ids = get_peft_model(model_of("Llama"), config(target_modules=["q_proj"])), tokens()
    expected = step(model, ids)
    report = pyft.apply(model)
    (entry,) = (entry for entry in report.modules if entry.runs == RUNS)
    assert entry.module == "base_model.model loss"
    assert "logits on request" in entry.why
    assert "TRL's trainers keep their own loss" in str(report)
    assert pyft.apply(model) == report
    assert_same(step(model, ids), expected)
    assert isinstance(model(input_ids=ids, labels=ids).logits, LazyLogits)
    assert type(model(input_ids=ids).logits) is Tensor


def largest_allocation(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the largest piece of memory that a training step asks for."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        model(input_ids=ids, labels=ids).loss.backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.unfilled
def test_cross_entropy_makes_nothing_of_the_logits_size() -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 4, "vocab_size": 40960}
    options = COMMON | small | {"max_position_embeddings": 1024}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options))
    ids = torch.randint(3, 4096, (1, 1024))
    logits = ids.numel() * small["vocab_size"] * 4
    assert largest_allocation(model, ids) >= logits
    fused_loss(model)
    assert largest_allocation(model, ids) <= 64 << 20 < logits


# ---- adapters and other heads --------------------------------------------------------------------


def with_adapter(name: str = "Llama", **options: Any) -> Any:
    targets = {"target_modules": ["q_proj", "lm_head"]}
    return get_peft_model(model_of(name), config(**(targets | options))).eval()


def two_adapters() -> Any:
    model = with_adapter()
    model.add_adapter("more", config(target_modules=["lm_head"], r=3))
    model.base_model.set_adapter(["default", "more"])
    return model


def tied_and_trained() -> Any:
    model = with_adapter("Qwen3", target_modules=["q_proj"])
    model.base_model.model.lm_head.weight.requires_grad_(True)
    return model


def quantized(model: Any) -> Any:
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    head.weight = nn.Parameter(pyft.quantize(head.weight), requires_grad=False)
    return model


def resized() -> Any:
    model = model_of("Llama")
    model.resize_token_embeddings(4103, mean_resizing=False)
    return model


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
HEADS: dict[str, Any] = {
    "LoRA": with_adapter,
    "LoRA with bias, rsLoRA": lambda: with_adapter(lora_bias=True, use_rslora=True),
    "LoRA on a tied head": lambda: with_adapter("Qwen3"),
    "LoRA on a softcapped head": lambda: with_adapter("Gemma2"),
    "two adapters": two_adapters,
    "dropout in evaluation": lambda: with_adapter(lora_dropout=0.5),
    "modules_to_save": lambda: with_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tied and trained": tied_and_trained,
    "quantized": lambda: quantized(with_adapter(target_modules=["q_proj"])),
    "LoRA on a quantized head": lambda: quantized(with_adapter()),
    "resized": resized,
    "prompts": lambda: get_peft_model(model_of("Llama"), PromptTuningConfig(**VIRTUAL)).eval(),
    "prefixes": lambda: get_peft_model(model_of("Llama"), PrefixTuningConfig(**VIRTUAL)).eval(),
    "float64": lambda: model_of("Llama").double(),
}


@pytest.mark.parametrize("name", HEADS)
def test_cross_entropy_of_heads(name: str, made: list[HeadCall]) -> None:
    model, ids = HEADS[name](), tokens()
    expected = step(copy.deepcopy(model), ids)
    pyft.apply(model)
    found = step(model, ids)
    assert isinstance(found[2].logits, LazyLogits)
    assert not made
    assert_same(found, expected)
    torch.testing.assert_close(found[2].logits + 0, expected[2].logits, rtol=1e-4, atol=1e-4)
    classes = {type(module) for module in copy.deepcopy(model).modules()}
    assert classes == {type(module) for module in model.modules()}
    pyft.revert(model)
    assert_same(step(model, ids), expected, 0)


def test_cross_entropy_of_an_adapter_that_is_switched(made: list[HeadCall]) -> None:
    model, ids = with_adapter(), tokens()
    plain = copy.deepcopy(model)
    pyft.apply(model)
    with model.disable_adapter(), plain.disable_adapter():
        found, expected = (m(input_ids=ids, labels=labelled(ids)) for m in (model, plain))
    assert not made
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits + 0, expected.logits)  # with the adapter on again
    model.merge_adapter()
    found = model(input_ids=ids, labels=labelled(ids))
    assert isinstance(found.logits, LazyLogits)
    torch.testing.assert_close(found.loss, plain(input_ids=ids, labels=labelled(ids)).loss)


def hooked() -> Any:
    model = model_of("Llama")
    model.lm_head.register_forward_hook(lambda module, args, y: 0.5 * y)
    return model


def forward_replaced() -> Any:
    model = model_of("Llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def other_loss() -> Any:
    model = model_of("Llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    return model


class Masking(transformers.LlamaForCausalLM):
    """Looks at its logits before the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        logits[..., 5] = -30.0
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def bart() -> Any:
    made = transformers.BartConfig(vocab_size=4096, d_model=16, decoder_ffn_dim=16)
    made.encoder_layers, made.decoder_layers = 1, 1
    return transformers.BartForConditionalGeneration(made).eval()


LEFT: dict[str, tuple[Any, str]] = {
    "hooks": (hooked, "hooks on its output head"),
    "DoRA": (lambda: with_adapter(use_dora=True), "it is a variant of LoRA"),
    "replaced": (forward_replaced, "its forward was replaced"),
    "another loss": (other_loss, "its loss is <lambda>"),
    "masked": (lambda: Masking(model_of("Llama").config).eval(), "more with the logits"),
    "logits its own": (bart, "does not call loss_function"),
    "tokens": (
        lambda: with_adapter(
            target_modules=["q_proj"], trainable_token_indices={"lm_head": [5], "embed_tokens": [5]}
        ),
        "its output head is TrainableTokensWrapper",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_cross_entropy_leaves_other_models(name: str) -> None:
    make, why = LEFT[name]
    model, ids = make(), tokens()
    expected = step(copy.deepcopy(model), ids) if name != "replaced" else step(model, ids)
    ((_, module, runs, found),) = set_loss(model)
    assert runs == f"{type(module).__name__}'s own loss"
    assert why in found
    result = step(model, ids)
    assert type(result[2].logits) is Tensor
    assert_same(result, expected, 0)


def test_cross_entropy_makes_logits_where_the_loss_cannot_go_without() -> None:
    model, ids = with_adapter(lora_dropout=0.5), tokens()
    report = pyft.apply(model)
    assert "drops inputs the logits are made" in str(report)
    assert type(step(model.train(), ids)[2].logits) is Tensor
    model = model_of("Llama")
    plain = copy.deepcopy(model)
    fused_loss(model)
    for each in (model, plain):
        each.config.vocab_size = 2048  # transformers' loss says what is wrong
        with pytest.raises(ValueError, match="to match target batch_size"):
            step(each, ids)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    plain.loss_function = model.loss_function
    assert_same(step(model, ids), step(plain, ids))


def test_cross_entropy_of_labels_that_are_none() -> None:
    model, ids = model_of("Llama"), tokens()
    fused_loss(model)
    ids_wrong = ids.clone()
    ids_wrong[1, 4] = 4096
    with pytest.raises(UsageError, match=r"labels\[1, 4\] is 4096; need 0 to 4095"):
        step(model, ids, labels=ids_wrong)
    assert step(model, ids, labels=torch.full_like(ids, -100))[0] == 0
    assert type(model(input_ids=ids).logits) is Tensor  # nothing is left behind


def test_cross_entropy_of_shifted_labels() -> None:
    model, ids = model_of("Llama"), tokens()
    shifted = nn.functional.pad(labelled(ids)[:, 1:], (0, 1), value=-100)
    expected = step(copy.deepcopy(model), ids)
    fused_loss(model)
    assert_same(step(model, ids, shift_labels=shifted), expected)


# ---- what else works with models -----------------------------------------------------------------


def test_cross_entropy_model_stays_what_it_was(tmp_path: Path) -> None:
    model, ids = model_of("Llama"), tokens()
    plain = copy.deepcopy(model)
    pyft.apply(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == type(plain).__module__
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.loss_function is plain.loss_function
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other(input_ids=ids, labels=ids).logits, LazyLogits)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert type(loaded) is type(plain)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    prompt = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt), plain.generate(**prompt))
    pyft.revert(model)
    assert type(model) is type(plain)
    assert type(model.lm_head) is nn.Linear
    assert model.__dict__.keys() == plain.__dict__.keys()


def test_cross_entropy_under_compile_is_plain() -> None:
    model, ids = model_of("Llama"), tokens()
    expected = step(copy.deepcopy(model), ids)
    fused_loss(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = compiled(input_ids=ids, labels=labelled(ids))
    assert type(outputs.logits) is Tensor
    assert outputs.loss.item() == expected[0]


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_cross_entropy_under_ddp(
    options: dict[str, bool], made: list[HeadCall], tmp_path: Path
) -> None:
    model, ids = model_of("Llama"), tokens()
    expected = step(copy.deepcopy(model), ids)
    fused_loss(model)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model, **options)
        for _ in range(2):
            loss, _, outputs = step(parallel, ids)
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert_same((loss, gradients, outputs), expected)
        assert not made
        parallel.zero_grad()
        parallel(input_ids=ids, labels=ids).logits.square().sum().backward()
        found = model.lm_head.weight.grad.clone()
    finally:
        torch.distributed.destroy_process_group()
    pyft.revert(model)
    model.zero_grad()
    model(input_ids=ids, labels=ids).logits.square().sum().backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """One in bf16. Its state is the process's, and other tests have another."""
    accelerate = pytest.importorskip("accelerate")
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    reset(reset_partial_state=True)


def test_cross_entropy_under_accelerate_s_mixed_precision(
    accelerator: Any, made: list[HeadCall]
) -> None:
    model, ids = model_of("Llama"), tokens()
    expected = step(accelerator.prepare(copy.deepcopy(model)), ids)
    fused_loss(model)
    found = step(accelerator.prepare(model), ids)
    assert isinstance(found[2].logits, LazyLogits)
    assert found[2].logits.dtype == torch.float32
    assert not made
    assert_same(found, expected, 2e-2)
    assert torch.equal(found[2].logits, expected[2].logits)


def test_cross_entropy_behind_accelerate_s_hooks(made: list[HeadCall]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = model_of("Llama"), tokens()
    expected = step(copy.deepcopy(model), ids)
    hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(model, hook)
    assert fused_loss(model) == RUNS
    found = step(model, ids)
    assert isinstance(found[2].logits, LazyLogits)
    assert not made
    assert_same(found, expected)
    pyft.revert(model)
    assert type(step(model, ids)[2].logits) is Tensor


# ---- training ------------------------------------------------------------------------------------


def rows(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    """Tokens and labels, of which the first few are ignored, a different number in each row."""
    found = []
    for index in range(count):
        ids = torch.randint(3, 4096, (length,)).tolist()
        prompt = 1 + 3 * index % (length - 2)
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def trained(model: Any, data: Any, path: Path, **options: Any) -> Trainer:
    metrics = options.pop("compute_metrics", None)
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "lr_scheduler_type": "constant", "seed": 3,
        "learning_rate": 1e-2, "optim": "sgd", "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(path), **(defaults | options))
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:4], compute_metrics=metrics
    )
    trainer.train()
    return trainer


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    assert logits.shape == (4, 11, 4096)
    return {"accuracy": float((logits.argmax(-1) == labels).mean()), "sum": float(logits.sum())}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_metrics": accuracy},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_cross_entropy_in_trainer(
    options: dict[str, Any], made: list[HeadCall], tmp_path: Path
) -> None:
    data, model = rows(8), model_of("Llama")
    plain = copy.deepcopy(model)
    fused_loss(model)
    logs = []
    for each in (plain, model):
        trainer = trained(each, data, tmp_path, **options)
        assert not made
        results = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        names = ("eval_loss", "eval_accuracy", "eval_sum")
        logs.append([*losses, *(results[name] for name in names if name in results)])
    assert bool(made) == ("compute_metrics" in options)
    assert len(logs[0]) == 4 + 2 * ("compute_metrics" in options)
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-3 if "bf16" in options else 1e-5, atol=0)


def test_cross_entropy_accumulated_is_that_of_one_batch(tmp_path: Path) -> None:
    """Micro-batches of different numbers of tokens."""
    data, model = rows(8), model_of("Llama")
    whole = copy.deepcopy(model)
    pyft.apply(model)
    pyft.apply(whole)
    common = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    one = trained(whole, data, tmp_path, per_device_train_batch_size=4, **common)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    four = trained(model, data, tmp_path, **parts, **common)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, four)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_trl_keeps_its_own_loss(made: list[HeadCall], tmp_path: Path) -> None:
    """apply before the trainer is made, and after."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    vocabulary = Path(pyft.__file__).parent / "embedded" / "model" / "tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(vocabulary), pad_token="<pad>", eos_token="</s>"
    )
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(8)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        report_to=[], bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    losses, said = [], []
    for when in ("never", "before", "after"):
        model = model_of("Llama")
        if when == "before":
            said += set_loss(model)
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        if when == "after":
            said += set_loss(model)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        pyft.revert(model)
        assert type(model(input_ids=tokens(), labels=tokens()).logits) is Tensor
    assert losses[1] == losses[2] == losses[0]
    assert not made
    assert [entry[2] for entry in said] == [RUNS, "LlamaForCausalLM's own loss"]
    assert "TRL's trainers keep their own loss" in said[0][3]
    assert "keeps a loss of its own" in said[1][3]


def test_cross_entropy_training_follows_the_logits() -> None:
    """100 steps of a 4-layer model in fp32: the losses agree to 1e-5 at every step."""
    options = COMMON | {"num_hidden_layers": 4, "initializer_range": 0.02}
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options))
    fused = copy.deepcopy(plain)
    fused_loss(fused)
    batches = [tokens(4, 32) for _ in range(8)]
    losses: list[list[float]] = []
    for model in (plain, fused):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        losses.append([])
        for index in range(100):
            loss, _, _ = step(model, batches[index % len(batches)])
            optimizer.step()
            losses[-1].append(loss)
    for found, expected in zip(losses[1], losses[0], strict=True):
        assert abs(found - expected) <= 1e-5 * expected
    assert losses[0][-1] < losses[0][0] - 0.1  # something was learned
