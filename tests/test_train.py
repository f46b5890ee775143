"""The training core on tiny models: loss scaling, divergence, early stopping, budget, replay."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from pyft.errors import PyftError, UsageError
from pyft.finetune import checkpoint, train
from pyft.finetune.batches import Packed, replay_rows
from pyft.finetune.config import Config
from pyft.finetune.forgetting import GeneralText
from pyft.finetune.loop import Loop, plan
from pyft.finetune.report import write_report
from pyft.finetune.template import Encoded

VOCABULARY = 258


@dataclass
class Loaded:
    """What pyft.finetune.model gives, for a model made here."""

    model: Any
    tokenizer: Any
    architecture: str = "llama"
    applied: Any = None


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with here is computed on the CPU; one thread is enough for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def tiny(dtype: torch.dtype = torch.float32, adapter: bool = True, dropout: float = 0.0) -> Loaded:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config).to(dtype)
    return Loaded(adapted(model, dropout) if adapter else model, byte_tokenizer())


def adapted(model: Any, dropout: float = 0.0) -> Any:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def teach(model: Any, general: GeneralText) -> None:
    """Train a base on general text, so that it has something to forget."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(10):
        for batch in general.batches():
            logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def rows_of(lengths: list[tuple[int, int]], seed: int = 0) -> list[Encoded]:
    """Random rows of (length, supervised tokens at the end); line numbers 1, 2, ..."""
    generator = np.random.default_rng(seed)
    rows = []
    for line, (length, supervised) in enumerate(lengths, 1):
        ids = generator.integers(2, 40, length).tolist()
        rows.append(Encoded(ids, [-100] * (length - supervised) + ids[-supervised:], line=line))
    return rows


ROWS = rows_of([(20 + 3 * n, 1 + 2 * n) for n in range(8)])
HELD_OUT = rows_of([(24, 12), (30, 9), (18, 10)], seed=1)


def job_config(directory: Path, **changes: Any) -> Config:
    data = directory / "data.jsonl"
    data.write_text('{"text": "a"}\n', encoding="utf-8")
    base: dict[str, Any] = {
        "model": directory / "base",
        "data": data,
        "output": directory / "out",
        "method": "lora",
        "dtype": "fp32",
        "max_length": 64,
        "pack": False,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "warmup": 0.0,
        "schedule": "constant",
    }
    return Config(**{**base, **changes})


def general_text(directory: Path, passages: int = 12) -> GeneralText:
    path = directory / "general.jsonl"
    texts = [f"passage number {n} says {'ab' * n} and stops" for n in range(passages)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return GeneralText(path, byte_tokenizer(), rows=4, max_length=64)


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def train_tiny(config: Config, loaded: Loaded | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"train_encoded": ROWS, "valid_encoded": [], "general": None}
    console = changes.pop("console", quiet_console())
    return train.run(config, loaded or tiny(), console=console, **{**arguments, **changes})


# Loss scaling


def unpacked_loss(model: Any, rows: list[Encoded]) -> Tensor:
    """Token-weighted mean over rows, each in a forward pass of its own, from the definition."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
        for position, label in enumerate(row.labels[1:]):
            if label != -100:
                total = total - F.log_softmax(logits[position], -1)[label]
                count += 1
    return total / count


class Catch(TrainerCallback):
    """Keep the gradients of the first step and stop."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.clone()
        control.should_training_stop = True


def first_step(config: Config) -> tuple[float, dict[str, Tensor], list[Encoded]]:
    """Loss and gradients of the first step, and the rows it took."""
    loaded = tiny()
    packed = Packed(ROWS, config, loaded.tokenizer)
    loop = Loop(
        config, loaded.model, packed.rows, packed.collate, packed.lines, packed.tokens, None
    )
    catch = Catch()
    loop.add_callback(catch)
    loop.train()
    lines = [packed.lines[row][0] for row in loop.order[:4]]
    return loop.step_loss, catch.gradients, [ROWS[line - 1] for line in lines]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4), (2, 2), (3, 2)])
def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_cut(
    tmp_path: Path, batch: int, accumulation: int
) -> None:
    rows_wanted = batch * accumulation
    config = job_config(
        tmp_path, batch_size=batch, gradient_accumulation=accumulation, max_grad_norm=0
    )
    loss, gradients, rows = first_step(config)
    model = tiny().model
    if rows_wanted != 4:
        order = plan(config, len(ROWS))[1][:rows_wanted]
        packed = Packed(ROWS, config, byte_tokenizer())
        rows = [ROWS[packed.lines[index][0] - 1] for index in order]
    expected = unpacked_loss(model, rows)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert gradients
    for name, gradient in gradients.items():
        truth = model.get_parameter(name).grad
        assert torch.allclose(gradient, truth, atol=1e-7, rtol=1e-4), name


def test_curve_is_the_same_for_any_cut_of_the_batch(tmp_path: Path) -> None:
    whole = train_tiny(job_config(tmp_path, batch_size=4, gradient_accumulation=1, epochs=2))
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        checkpoint.remove_directory(path)
    parts = train_tiny(job_config(tmp_path, batch_size=1, gradient_accumulation=4, epochs=2))
    assert [point["step"] for point in whole["curve"]] == [1, 2, 3, 4]
    for one, other in zip(whole["curve"], parts["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert one["tokens"] == other["tokens"]


def test_curve_points_between_are_token_weighted(tmp_path: Path) -> None:
    config = job_config(tmp_path, batch_size=1, gradient_accumulation=1, learning_rate=1e-12)
    fine = train_tiny(config.model_copy(update={"output": tmp_path / "fine"}))["curve"]
    coarse = train_tiny(config.model_copy(update={"log_every": 4}))["curve"]
    assert [point["step"] for point in coarse] == [4, 8]
    packed = Packed(ROWS, config, byte_tokenizer())
    supervised = [ROWS[packed.lines[row][0] - 1].supervised for row in plan(config, 8)[1]]
    losses = [point["loss"] for point in fine]
    expected = np.average(losses[:4], weights=supervised[:4])
    assert coarse[0]["loss"] == pytest.approx(expected, abs=1e-9)
    assert abs(expected - np.mean(losses[:4])) > 1e-5


# Order and schedule


def test_plan_takes_each_row_once_an_epoch_in_a_seeded_order(tmp_path: Path) -> None:
    config = job_config(tmp_path, epochs=2.5, batch_size=3, gradient_accumulation=2)
    steps, order = plan(config, 10)
    assert steps == 5
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert plan(config, 10)[1] == order
    assert plan(config.model_copy(update={"seed": 1}), 10)[1] != order
    assert plan(config.model_copy(update={"max_steps": 3}), 10) == (3, plan(config, 10)[1][:18])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_follows_the_schedule(tmp_path: Path, schedule: str) -> None:
    config = job_config(tmp_path, schedule=schedule, max_steps=10, warmup=0.2)
    rates = [point["learning_rate"] for point in train_tiny(config)["curve"]]
    for step, rate in enumerate(rates):
        part = (step - 2) / 8
        after = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}
        expected = step / 2 if step < 2 else after[schedule]
        assert rate == pytest.approx(1e-2 * expected, abs=1e-12)


# Divergence


class Poison(torch.nn.Module):
    """Stands behind the head and makes the logits NaN in one training forward pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.seen += module.training
        return output * math.nan if module.training and self.seen == self.at else output


def test_nan_loss_stops_at_once_and_names_step_rows_and_checkpoint(tmp_path: Path) -> None:
    config = job_config(tmp_path, max_steps=8, save_every=2)
    loaded = tiny()
    loaded.model.get_base_model().lm_head.register_forward_hook(Poison(at=10))
    with pytest.raises(PyftError) as caught:
        train_tiny(config, loaded)
    message = str(caught.value)
    order = plan(config, len(ROWS))[1]
    packed = Packed(ROWS, config, byte_tokenizer())
    lines = sorted(packed.lines[row][0] for row in order[18:20])
    good = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    assert "\n" not in message
    assert f"the loss is nan at step 5, on lines {lines[0]}, {lines[1]} of {config.data}" in message
    assert f"the last good checkpoint is {good}" in message
    weights = load_file(good / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert max(checkpoint.checkpoints(good.parent)) == 4


def test_infinite_gradient_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    config = job_config(tmp_path, max_steps=4)
    loaded = tiny()
    weight = next(p for p in loaded.model.parameters() if p.requires_grad)
    seen = []

    def spoil(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient * math.inf if len(seen) == 6 else gradient

    weight.register_hook(spoil)
    with pytest.raises(
        PyftError, match=r"the gradient is (nan|inf) at step 3, on lines .* is .*-2;"
    ):
        train_tiny(config, loaded)
    assert bool(weight.isfinite().all())


def test_nan_in_a_measurement_names_the_checkpoint(tmp_path: Path) -> None:
    loaded = tiny()
    calls = []

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module.training)
        return output * math.nan if not module.training and True in calls else output

    loaded.model.get_base_model().lm_head.register_forward_hook(spoil)
    config = job_config(tmp_path, max_steps=4, eval_every=2, save_every=1)
    with pytest.raises(PyftError, match=r"step 2: .*not a finite number.*checkpoint-1"):
        train_tiny(config, loaded, valid_encoded=HELD_OUT)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (NotImplementedError("some operator"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_one_line_and_nothing_else_is_taken_for_it(
    tmp_path: Path, error: RuntimeError, told: bool
) -> None:
    loaded = tiny()

    def fail(module: Any, inputs: Any) -> None:
        raise error

    loaded.model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(PyftError if told else type(error)) as caught:
        train_tiny(job_config(tmp_path, max_steps=1), loaded)
    if told:
        assert "out of memory" in str(caught.value)
        assert "lower batch_size" in str(caught.value)
        assert "\n" not in str(caught.value)


# Stopping and what is exported


def adapter_in(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model))


def assert_exported(config: Config, loaded: Loaded, step: int) -> None:
    path = config.output / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors"
    saved = load_file(path)
    now = adapter_in(loaded.model)
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[name], now[name]) for name in saved)


def test_patience_keeps_and_exports_the_best(tmp_path: Path) -> None:
    config = job_config(
        tmp_path, max_steps=60, eval_every=1, patience=3, learning_rate=5e-2, keep_checkpoints=1
    )
    loaded = tiny()
    result = train_tiny(config, loaded, valid_encoded=HELD_OUT)
    losses = {entry["step"]: entry["loss"] for entry in result["evaluations"]}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 3 < 60
    assert best > 0
    assert result["exported_step"] == best
    assert result["outcome"].startswith("stopped: validation loss did not improve in 3")
    assert result["task"]["after"]["loss"] == losses[best]
    assert result["task"]["change"] == pytest.approx(losses[best] / losses[0] - 1)
    assert_exported(config, loaded, best)


def test_without_patience_the_last_step_is_exported(tmp_path: Path) -> None:
    config = job_config(tmp_path, max_steps=5, eval_every=2)
    loaded = tiny()
    result = train_tiny(config, loaded, valid_encoded=HELD_OUT)
    assert [entry["step"] for entry in result["evaluations"]] == [0, 2, 4, 5]
    assert (result["outcome"], result["exported_step"]) == ("finished", 5)
    assert_exported(config, loaded, 5)


def test_crossed_budget_stops_and_exports_the_last_within(tmp_path: Path) -> None:
    config = job_config(
        tmp_path, max_steps=60, eval_every=2, learning_rate=3e-3, forgetting_budget=0.05
    )
    general = general_text(tmp_path)
    loaded = tiny(adapter=False)
    teach(loaded.model, general)
    loaded.model = adapted(loaded.model)
    result = train_tiny(config, loaded, general=general)
    forgetting = result["forgetting"]
    points = {point["step"]: point["delta"] for point in forgetting["points"]}
    crossed_at = forgetting["crossed_at"]
    assert 0 < crossed_at == max(points) < 60
    assert points[crossed_at] > 0.05
    assert points[0] == pytest.approx(0, abs=1e-6)
    assert all(delta <= 0.05 for step, delta in points.items() if step < crossed_at)
    assert result["exported_step"] == crossed_at - 2
    assert f"step {crossed_at - 2} is exported" in result["outcome"]
    assert_exported(config, loaded, crossed_at - 2)


def test_patience_without_validation_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="patience: there is no validation row"):
        train_tiny(job_config(tmp_path, patience=1))


def test_no_supervised_token_is_refused(tmp_path: Path) -> None:
    rows = [Encoded([1, 2, 3], [-100] * 3, line=1)]
    with pytest.raises(UsageError, match="no row has a token to train on"):
        train_tiny(job_config(tmp_path), train_encoded=rows)


# Precision and methods


def test_adapter_of_a_bf16_base_trains_in_fp32(tmp_path: Path) -> None:
    loaded = tiny(torch.bfloat16)
    result = train_tiny(job_config(tmp_path, max_steps=3, dtype="bf16"), loaded)
    kinds = {(p.requires_grad, p.dtype) for p in loaded.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    reference = train_tiny(job_config(tmp_path, max_steps=3, output=tmp_path / "fp32"))
    for one, other in zip(result["curve"], reference["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_keeps_fp32_weights_and_gives_back_the_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = job_config(tmp_path, method="full", max_steps=6, learning_rate=1e-4)
    loaded = tiny(dtype, adapter=False)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    result = train_tiny(config, loaded, general=general_text(tmp_path), valid_encoded=HELD_OUT)
    assert result["task"]["change"] < 0
    assert result["forgetting"]["points"][-1]["kl"] > 0
    saved = load_file(config.output / "checkpoints" / "checkpoint-6" / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == dtype
        assert saved[name].dtype == torch.float32
        assert torch.equal(parameter, saved[name].to(dtype))
    changed = [not torch.equal(before[name], saved[name].to(dtype)) for name in before]
    assert any(changed)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = train_tiny(job_config(tmp_path, max_steps=3))
    config = job_config(tmp_path, max_steps=3, gradient_checkpointing=True, output=tmp_path / "gc")
    again = train_tiny(config)
    assert [p["loss"] for p in plain["curve"]] == [p["loss"] for p in again["curve"]]


# Replay


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_replay_is_the_fraction_of_all_tokens(tmp_path: Path, fraction: float) -> None:
    general = general_text(tmp_path, passages=40)
    rows, times = replay_rows(fraction, 3000, general)
    tokens = sum(len(row.input_ids) for row in rows)
    longest = max(len(row.input_ids) for row in rows)
    assert abs(tokens - fraction / (1 - fraction) * 3000) <= longest / 2
    measured = {tuple(ids) for ids in general.measured}
    assert not measured & {tuple(row.input_ids) for row in rows}
    assert all(row.labels == [-100, *row.input_ids[1:]] and row.line == 0 for row in rows)
    assert (times > 1) == (len(rows) > 36)


def test_replay_is_trained_on(tmp_path: Path) -> None:
    general = general_text(tmp_path, passages=40)
    result = train_tiny(job_config(tmp_path, replay=0.5, epochs=1), general=general)
    own = sum(len(row.input_ids) for row in ROWS)
    assert result["data"]["train_tokens"] == pytest.approx(2 * own, abs=40)
    assert result["performance"]["tokens"] == result["data"]["train_tokens"]
    with pytest.raises(UsageError, match="replay: no general text is left"):
        train_tiny(job_config(tmp_path, replay=0.5))


# What a run shows and returns


def test_plain_lines_off_a_terminal_and_nothing_from_the_libraries(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console = quiet_console()
    config = job_config(tmp_path, max_steps=4, log_every=2)
    train_tiny(config, console=console, valid_encoded=HELD_OUT)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert all("loss" in line and "tokens/s" in line and "left" in line for line in lines)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    train_tiny(job_config(tmp_path, max_steps=2), console=console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2/2" in text
    assert "tokens/s" in text


def test_result_is_json_and_complete(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer() -> list[str]:
        asked.append(1)
        return [f"answer {len(asked)}"]

    def parity(loaded: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [{"op": "x", "tokens": int(batch["input_ids"].shape[0])}]

    result = train_tiny(
        job_config(tmp_path, max_steps=2),
        valid_encoded=HELD_OUT[:1],
        general=general_text(tmp_path),
        answers=answer,
        parity=parity,
    )
    json.dumps(result, allow_nan=False)
    assert result["answers"] == {"before": ["answer 1"], "after": ["answer 2"]}
    assert result["parity"] == [{"op": "x", "tokens": 1}]
    assert result["evaluations"][0]["low"] is None  # one sequence has no interval
    performance = result["performance"]
    assert performance["steps"] == 2
    assert performance["peak_host_bytes"] > 50 << 20
    assert performance["tokens_per_second"] == performance["tokens"] / performance["seconds"]
    assert performance["tokens"] == result["curve"][-1]["tokens"] == 8 * 30.5


def test_a_comparison_of_kernels_that_fails_costs_no_result(tmp_path: Path) -> None:
    def parity(loaded: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        raise KeyError("vision_tower.q_proj")

    console = quiet_console()
    config = job_config(tmp_path, max_steps=1)
    result = train_tiny(config, console=console, parity=parity)
    why = "not compared: KeyError: 'vision_tower.q_proj'"
    assert result["outcome"] == "finished"
    assert [(row["quantity"], row["passed"]) for row in result["parity"]] == [(why, False)]
    assert isinstance(console.file, io.StringIO)
    assert f"kernel parity: {why}" in console.file.getvalue().splitlines()
    report = write_report({"outcome": "finished", "parity": result["parity"]}, tmp_path)
    assert "KeyError" in report.read_text(encoding="utf-8")


def test_rows_are_packed_only_where_the_model_isolates_them(tmp_path: Path) -> None:
    opt = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, word_embed_proj_dim=16, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    base: Any = OPTForCausalLM(opt)
    shown = quiet_console()
    config = job_config(tmp_path, pack=True, max_steps=1, batch_size=8, gradient_accumulation=1)
    expected = unpacked_loss(base, ROWS).item()
    alone = Loaded(adapted(base), byte_tokenizer(), "OPTForCausalLM")
    result = train_tiny(config, alone, console=shown, valid_encoded=HELD_OUT)
    why = "OPTForCausalLM lets packed rows see each other"
    assert result["data"]["packing"] == f"off: {why}"
    assert result["data"]["packed_rows"] == len(ROWS)
    assert result["curve"][0]["loss"] == pytest.approx(expected, abs=1e-5)
    with alone.model.disable_adapter():
        held_out = unpacked_loss(alone.model, HELD_OUT).item()
    assert result["evaluations"][0]["loss"] == pytest.approx(held_out, abs=1e-5)
    assert isinstance(shown.file, io.StringIO)
    assert f"packing: {why}; rows are not packed" in shown.file.getvalue().splitlines()

    packed = train_tiny(config.model_copy(update={"output": tmp_path / "llama"}))
    assert packed["data"]["packing"] == "isolated"
    assert packed["data"]["packed_rows"] < len(ROWS)


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_tiny(job_config(tmp_path, max_steps=3, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == pytest.approx([point["loss"] for point in result["curve"]], rel=1e-6)
