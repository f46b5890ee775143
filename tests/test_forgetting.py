"""Forgetting on general text: loss, KL and loss change against the base, with truth in float64."""

import copy
import gc
import json
import math
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyft.errors import PyftError, UsageError
from pyft.finetune import evaluate, forgetting
from pyft.finetune.forgetting import GeneralText, Point, crossed, measure, remember_base

VOCABULARY = 64


def tiny_tokenizer():
    """A word is a token; <s> is put in front."""
    words = ["<unk>", "<s>", "</s>"] + [f"w{index}" for index in range(VOCABULARY - 3)]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.1))


def train_a_little(model, scale=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def write_passages(path, count, seed=0, longest=30):
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = generator.integers(0, VOCABULARY - 3, int(generator.integers(5, longest)))
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    return path


@pytest.fixture
def general(tmp_path):
    return GeneralText(write_passages(tmp_path / "g.jsonl", 24), tiny_tokenizer(), 12, 32)


def logits_alone(model, passage):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([passage])).logits[0, :-1].double()


def truth(base, tuned, passages):
    """Per passage: tokens, base and tuned loss sums, KL sums; float64, a passage at a time."""
    rows = []
    for passage in passages:
        before, after = logits_alone(base, passage), logits_alone(tuned, passage)
        wanted = torch.tensor(passage[1:])
        kl = F.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True
        )
        losses = [F.cross_entropy(x, wanted, reduction="sum").item() for x in (before, after)]
        rows.append([len(wanted), *losses, kl.item()])
    return np.array(rows).T


def check(point, base, tuned, passages, rel=2e-5):
    tokens, before, after, kl = truth(base, tuned, passages)
    assert point.loss == pytest.approx(after.sum() / tokens.sum(), rel=rel)
    assert point.delta == pytest.approx((after - before).sum() / tokens.sum(), rel=rel, abs=1e-6)
    if point.kl is not None:
        assert point.kl == pytest.approx(kl.sum() / tokens.sum(), rel=rel)
        assert point.kl_low < point.kl < point.kl_high
    assert point.loss_low < point.loss < point.loss_high
    assert point.delta_low < point.delta < point.delta_high


def test_before_training_nothing_is_forgotten(general):
    point = measure(adapted(tiny_model()).train(), general)
    assert point.delta == point.delta_low == point.delta_high == 0.0
    assert point.kl == pytest.approx(0.0, abs=1e-6)
    assert point.kl_high == pytest.approx(0.0, abs=1e-6)
    assert point.loss > 1


@pytest.mark.parametrize("slab", [1, 5, 1 << 20])
def test_adapter_against_float64_truth(general, slab, monkeypatch):
    monkeypatch.setattr(evaluate, "SLAB_ELEMENTS", slab * VOCABULARY)
    base = tiny_model()
    tuned = adapted(copy.deepcopy(base))
    train_a_little(tuned)
    point = measure(tuned, general)
    assert point.kl > 0.01
    assert abs(point.delta) > 0.005
    check(point, base, tuned, general.measured)


def test_delta_interval_is_paired(general):
    base = tiny_model()
    tuned = adapted(copy.deepcopy(base))
    train_a_little(tuned, 0.02)
    point = measure(tuned, general)
    order = sorted(general.measured, key=len)
    tokens, before, after, _ = truth(base, tuned, order)
    low, high = evaluate.interval(after - before, tokens)
    assert (point.delta_low, point.delta_high) == pytest.approx((low, high), rel=1e-4, abs=1e-6)
    assert point.delta_high - point.delta_low < 0.5 * (point.loss_high - point.loss_low)


def test_training_state_is_left_as_it_was(general):
    model = adapted(tiny_model()).train()
    train_a_little(model)
    batch = next(general.batches())
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    first = measure(model, general)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert measure(model, general) == first


def test_a_frozen_adapter_stays_frozen_and_on(general, tmp_path):
    tuned = adapted(tiny_model())
    train_a_little(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert measure(loaded, general).kl == pytest.approx(measure(tuned, general).kl, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.get_model_status().enabled is True


def test_the_adapter_is_on_again_after_an_error():
    model = adapted(tiny_model())
    seen = []

    def fail():
        with forgetting.adapter_off(model):
            seen.append(model.get_model_status().enabled)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [False]
    assert model.get_model_status().enabled is True
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_full_fine_tuning_against_its_remembered_base(general, tmp_path, dtype, rel):
    base = tiny_model(dtype)
    model = copy.deepcopy(base).train()
    cache = remember_base(model, general, directory=tmp_path)
    assert model.training
    assert cache.why_no_kl is None
    before = measure(model, general, cache)
    assert (before.delta, before.kl) == pytest.approx((0.0, 0.0), abs=1e-6)
    train_a_little(model, 0.03)
    check(measure(model, general, cache), base, model, general.measured, rel)
    assert list(tmp_path.glob("tmp*")) == []


@pytest.mark.parametrize("slab", [5, 1 << 20])
def test_the_remembered_base_is_the_adapter_switched_off(general, slab, monkeypatch):
    monkeypatch.setattr(evaluate, "SLAB_ELEMENTS", slab * VOCABULARY)
    model = adapted(tiny_model())
    cache = remember_base(model, general)
    train_a_little(model)
    assert measure(model, general, cache) == measure(model, general)


def test_base_logits_above_the_budget_leave_the_loss_and_say_why(general):
    base = tiny_model()
    model = copy.deepcopy(base)
    needed = general.tokens * VOCABULARY * 4
    assert remember_base(model, general, needed).why_no_kl is None
    cache = remember_base(model, general, needed - 1)
    assert "above the budget" in cache.why_no_kl
    train_a_little(model)
    point = measure(model, general, cache)
    assert (point.kl, point.kl_low, point.kl_high) == (None, None, None)
    check(point, base, model, general.measured)


def test_a_disk_that_fills_up_leaves_the_loss_and_says_why(general, tmp_path):
    base = tiny_model()
    model = copy.deepcopy(base)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        cache = remember_base(model, general, directory=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in cache.why_no_kl
    assert "large" in cache.why_no_kl
    train_a_little(model)
    point = measure(model, general, cache)
    assert point.kl is None
    check(point, base, model, general.measured)


def test_a_model_without_a_base_is_refused(general):
    with pytest.raises(PyftError, match="needs a base"):
        measure(tiny_model(), general)


def test_nan_names_the_batch(general):
    model = adapted(tiny_model())
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(PyftError, match="batch 0 of the general text"):
        measure(model, general)
    assert model.get_model_status().enabled is True


def test_measuring_keeps_no_tensor(general):
    model = adapted(tiny_model())
    measure(model, general)

    def alive():
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    before = alive()  # held, so that none of them goes and no other takes its id
    measure(model, general)
    assert {id(tensor) for tensor in alive()} == {id(tensor) for tensor in before}


@pytest.mark.parametrize(
    ("delta", "budget", "over"),
    [(0.2, 0.1, True), (0.1, 0.1, False), (-1.0, 0.0, False), (9.0, None, False)],
)
def test_the_mean_decides_whether_the_budget_is_crossed(delta, budget, over):
    point = Point(1.0, 0.9, 1.1, 0.1, 0.0, 0.2, delta, delta - 5, delta + 5)
    assert crossed(point, budget) is over


def test_text_paragraphs_are_grouped_and_nothing_is_lost(tmp_path):
    path = tmp_path / "g.txt"
    paragraphs = [f"w{i} w{i + 1}\nw{i + 2} w{i + 3} w{i + 4}" for i in range(10, 50)]
    path.write_bytes(("\r\n \r\n\r\n".join(paragraphs)).replace("\n", "\r\n").encode())
    general = GeneralText(path, tiny_tokenizer(), 100, 21)
    passages = general.measured + general.replay(100)
    assert len(general.measured) == math.ceil(len(passages) / 2)
    assert max(map(len, passages)) <= 21
    assert np.mean([len(passage) for passage in passages]) > 12
    assert all(passage[0] == 1 for passage in passages)
    words = sorted(token for passage in passages for token in passage[1:])
    assert words == sorted(3 + i + k for i in range(10, 50) for k in range(5))
    assert general.tokens == sum(len(passage) - 1 for passage in general.measured)


def test_long_texts_are_cut_between_words(tmp_path):
    words = [f"w{index % 61}" for index in range(500)]
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"text": " ".join(words)}) + "\n\n")
    general = GeneralText(path, tiny_tokenizer(), 100, 50)
    passages = general.measured + general.replay(100)
    assert len(passages) >= 10
    assert 0 not in {token for passage in passages for token in passage}


def test_measured_and_replayed_passages_never_overlap(tmp_path):
    path = write_passages(tmp_path / "g.jsonl", 30)
    path.write_text(path.read_text() * 3)
    general = GeneralText(path, tiny_tokenizer(), 10, 32)
    measured, replayed = map(tuple, general.measured), map(tuple, general.replay(1000))
    measured, replayed = list(measured), list(replayed)
    assert (len(measured), len(replayed)) == (10, 20)
    assert len(set(measured) | set(replayed)) == 30
    assert [tuple(passage) for passage in general.replay(7)] == replayed[:7]


def test_the_sample_depends_on_the_seed_only(tmp_path):
    path = write_passages(tmp_path / "g.jsonl", 40)
    first, again, other = (
        GeneralText(path, tiny_tokenizer(), 10, 32, seed=seed).measured for seed in (3, 3, 4)
    )
    assert first == again != other


def test_batches_are_packed_rows(tmp_path):
    general = GeneralText(write_passages(tmp_path / "g.jsonl", 30), tiny_tokenizer(), 15, 32)
    batches = list(general.batches(64))
    seen = []
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        rows, width = batch["input_ids"].shape
        assert rows * width <= 64
        for ids, labels, positions in zip(*batch.values(), strict=True):
            length = int((labels != -100).sum()) + 1
            assert labels[0] == -100
            assert (labels[length:] == -100).all()
            assert torch.equal(labels[1:length], ids[1:length])
            assert positions[:length].tolist() == list(range(length))
            assert positions[length:].tolist() == list(range(width - length))
            seen.append(ids[:length].tolist())
    assert sorted(seen) == sorted(general.measured)
    assert any(batch["input_ids"].shape[0] > 1 for batch in batches)


def test_the_default_is_the_text_shipped_with_pyft(tmp_path, monkeypatch):
    path = write_passages(tmp_path / "shipped.jsonl", 8)
    monkeypatch.setattr("pyft.embedded.GENERAL_TEXT", path)
    general = GeneralText(None, tiny_tokenizer(), 3, 32)
    assert general.source == str(path)
    assert len(general.measured) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "missing"),
        ("folder.txt", "directory", "is a directory"),
        ("g.csv", b"a,b\n", r"\.txt or \.jsonl"),
        ("g.txt", b" \n\n \n", "empty"),
        ("g.txt", b"fine\nfine\nbad \xff\n", r"g\.txt:3: not UTF-8"),
        ("g.jsonl", b'{"text": "w1 w2"}\n\n{"text": \n', r"g\.jsonl:3: not JSON"),
        ("g.jsonl", b'{"text": "w1 w2"}\n{"txt": "a"}\n', r'g\.jsonl:2: no "text"'),
        ("g.jsonl", b'["w1"]\n', r'g\.jsonl:1: no "text"'),
        ("g.jsonl", b'{"text": ""}\n', "empty"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        GeneralText(path, tiny_tokenizer(), 4, 32)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
