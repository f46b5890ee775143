"""Held-out loss, its interval and greedy answers, against truth computed another way."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyft.errors import PyftError
from pyft.finetune import evaluate as subject
from pyft.finetune.evaluate import Estimate, answers, evaluate, evaluate_loss, interval

VOCABULARY = 61
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_tokenizer():
    words = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def packed(rows, width, seed=0):
    """A batch from rows of (length, supervised tokens) sequences; the rest of a row is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(rows), width), generator=generator)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sequences in enumerate(rows):
        at = 0
        for length, supervised in sequences:
            positions[row, at : at + length] = torch.arange(length)
            first = at + length - supervised
            labels[row, first : at + length] = ids[row, first : at + length]
            at += length
        positions[row, at:] = torch.arange(width - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def alone(model, batch):
    """Truth: every sequence cut out, run by itself, and summed with F.cross_entropy in float64."""
    sums, counts = [], []
    for ids, labels, positions in zip(*batch.values(), strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for low, high in itertools.pairwise(starts):
            wanted = labels[low:high][1:]
            if (wanted != -100).any():
                with torch.no_grad():
                    logits = model(input_ids=ids[None, low:high]).logits[0, :-1]
                total = F.cross_entropy(logits.double(), wanted, ignore_index=-100, reduction="sum")
                sums.append(total.item())
                counts.append(int((wanted != -100).sum()))
    return np.array(sums), np.array(counts)


BATCHES = [
    packed([[(7, 3), (9, 8)], [(16, 1)]], 20, seed=1),
    packed([[(5, 4), (5, 0), (2, 1)], [(3, 2)], [(13, 12)]], 13, seed=2),
    packed([[(4, 0)]], 6, seed=3),
]


def test_sequence_losses_equal_each_sequence_alone():
    model = tiny_model().eval()
    found = subject.sequence_losses(model, BATCHES)
    truth = [alone(model, batch) for batch in BATCHES]
    np.testing.assert_array_equal(found.tokens, np.concatenate([counts for _, counts in truth]))
    np.testing.assert_allclose(found.sums, np.concatenate([sums for sums, _ in truth]), rtol=2e-6)


def test_mean_is_weighted_by_tokens_and_inside_its_interval():
    model = tiny_model()
    found = evaluate_loss(model, BATCHES)
    truth = [alone(model.eval(), batch) for batch in BATCHES]
    sums = np.concatenate([sums for sums, _ in truth])
    counts = np.concatenate([counts for _, counts in truth])
    assert isinstance(found, Estimate)
    assert found.tokens == counts.sum() == 31
    assert found.mean == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)
    assert abs(found.mean - np.mean(sums / counts)) > 1e-3
    assert found.low < found.mean < found.high
    assert found == evaluate_loss(model, BATCHES)


def test_the_first_token_of_a_sequence_is_never_predicted_from_its_neighbour():
    batch = packed([[(6, 5), (6, 6)]], 12)
    assert batch["labels"][0, 6] != -100
    wanted = subject.targets(batch)
    assert wanted.rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert wanted.sequences.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_the_size_of_a_slab_does_not_change_the_losses(rows, monkeypatch):
    model = tiny_model()
    truth = subject.sequence_losses(model, BATCHES)
    monkeypatch.setattr(subject, "SLAB_ELEMENTS", rows * VOCABULARY)
    np.testing.assert_allclose(subject.sequence_losses(model, BATCHES).sums, truth.sums, rtol=1e-6)


def test_fp32_logits_of_a_bf16_model_never_exist_whole(monkeypatch):
    monkeypatch.setattr(subject, "SLAB_ELEMENTS", 8 * VOCABULARY)
    model = tiny_model(dtype=torch.bfloat16)
    batch = packed([[(100, 99)]], 100)
    wide: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            wide.extend(
                tensor.numel()
                for tensor in (out if isinstance(out, tuple | list) else [out])
                if isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tensor.shape[-1:] == (VOCABULARY,)
            )
            return out

    with Watch():
        evaluate_loss(model, [batch])
    assert max(wide) == 8 * VOCABULARY


def test_model_and_random_state_are_left_as_they_were():
    model = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, r=2)
    ).train()
    model.get_submodule("base_model.model.model.norm").eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    flags = [module.training for module in model.modules()]
    state, cache = torch.get_rng_state(), model.config.use_cache
    first = evaluate_loss(model, BATCHES)
    answers(model, tiny_tokenizer(), ["w1 w2"], 4)
    assert evaluate_loss(model, BATCHES) == first
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.use_cache is cache is False
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_mode_is_restored_after_a_failure():
    model = tiny_model().train()
    with pytest.raises(KeyError):
        evaluate_loss(model, [{"labels": torch.zeros(1, 2, dtype=torch.int64)}])
    assert model.training
    assert torch.is_grad_enabled()


def test_no_graph_and_no_tensor_is_kept():
    model = tiny_model()
    evaluate_loss(model, BATCHES)

    def alive():
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    before = alive()  # held, so that none of them goes and no other takes its id
    found = subject.sequence_losses(model, BATCHES * 5)
    assert {id(tensor) for tensor in alive()} == {id(tensor) for tensor in before}
    assert isinstance(found.sums, np.ndarray)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_batch(value):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = value
    good = packed([[(5, 4)]], 5)
    good["input_ids"][:] = 3
    bad = {name: tensor.clone() for name, tensor in good.items()}
    bad["input_ids"][0, 2] = 7
    with pytest.raises(PyftError, match="not a finite number in batch 2"):
        evaluate_loss(model, [good, good, bad, good])


def test_nothing_supervised_is_an_error_and_one_sequence_has_no_interval():
    model = tiny_model()
    with pytest.raises(PyftError, match="no supervised token"):
        evaluate_loss(model, [BATCHES[2]])
    with pytest.raises(PyftError, match="no supervised token"):
        evaluate_loss(model, [])
    one = evaluate_loss(model, [packed([[(9, 4)]], 9)])
    assert one.tokens == 4
    assert math.isfinite(one.mean)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


@pytest.mark.parametrize("sequences", [10, 20, 64])
def test_intervals_cover_the_truth_about_95_percent_of_the_time(sequences):
    """Clustered data: tokens of a sequence share its own level, sequences differ in length."""
    generator = np.random.default_rng(5)
    trials, hits = 400, 0
    for _ in range(trials):
        tokens = generator.integers(20, 200, sequences)
        sums = tokens * (2.0 + 0.5 * generator.standard_normal(sequences))
        sums += np.sqrt(tokens) * generator.standard_normal(sequences)
        low, high = interval(sums, tokens, seed=int(generator.integers(1 << 30)))
        hits += low <= 2.0 <= high
    assert 0.92 <= hits / trials <= 0.98


def test_interval_is_that_of_clusters_and_not_of_tokens():
    """With all tokens of a sequence alike, the spread is t * sd / sqrt(sequences)."""
    sums = np.random.default_rng(1).normal(3.0, 1.0, 200) * 50
    low, high = interval(sums, np.full(200, 50))
    expected = 2 * 1.972 * (sums / 50).std(ddof=1) / math.sqrt(200)
    assert high - low == pytest.approx(expected, rel=0.05)
    assert interval(sums, np.full(200, 50)) == (low, high)
    assert interval(sums, np.full(200, 50), seed=1) != (low, high)


def test_interval_weighs_sequences_by_their_tokens():
    """Long sequences lose 1 nat a token and short ones 3: the mean over tokens is near 1.1."""
    tokens = np.tile([190, 10], 50)
    sums = tokens * np.tile([1.0, 3.0], 50)
    low, high = interval(sums, tokens)
    assert sums.sum() / tokens.sum() == pytest.approx(1.1)
    assert 1.0 < low < 1.1 < high < 1.3


def greedy(model, ids, count):
    """Truth: argmax of the whole sequence again for each token, no cache."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_answers_equal_an_argmax_loop_and_generate():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    prompts = ["w1 w2 w3", "w30 w4 w5 w6 w7 w8 w9", "w11"]
    found = answers(model.train(), tokenizer, prompts, 12)
    model.eval()
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        truth = greedy(model, ids, 12)[0, ids.shape[1] :].tolist()
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=2,
        )
        assert generated[0, ids.shape[1] :].tolist() == truth
        if 2 in truth:
            truth = truth[: truth.index(2)]
        assert text == tokenizer.decode(truth, skip_special_tokens=True)
    assert len(set(found)) == 3


def next_tokens(pairs):
    """A model that says token b after token a, for each a: b."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for channel, (token, follower) in enumerate(pairs.items()):
            model.model.embed_tokens.weight[token, channel] = 1.0
            model.lm_head.weight[follower, channel] = 1.0
    return model


def test_answers_stop_at_eos_and_at_the_end_of_turn():
    tokenizer = tiny_tokenizer()
    w = tokenizer.convert_tokens_to_ids
    end_of_text = next_tokens({w("w1"): w("w2"), w("w2"): w("</s>"), w("</s>"): w("w3")})
    assert answers(end_of_text, tokenizer, ["w1"], 8) == ["w2"]
    of_model = next_tokens({w("w1"): w("w2"), w("w2"): w("w9"), w("w9"): w("w3")})
    of_model.generation_config.eos_token_id = [w("w9")]
    assert answers(of_model, tokenizer, ["w1"], 8) == ["w2"]
    of_turn = next_tokens({w("w1"): w("w2"), w("w2"): w("<|im_end|>"), w("<|im_end|>"): w("w3")})
    assert answers(of_turn, tokenizer, ["w1"], 8)[0].startswith("w2 w3")
    assert answers(of_turn, tokenizer, ["w1"], 8, CHATML) == ["w2"]
    tokenizer.chat_template = CHATML
    assert answers(of_turn, tokenizer, ["w1"], 8) == ["w2"]


def test_a_template_without_a_special_end_of_turn_adds_no_stop():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\nw5 {% endfor %}"
    assert subject.stop_ids(tiny_model(), tiny_tokenizer(), plain) == {2}


def test_answers_ignore_the_sampling_settings_of_a_checkpoint():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    truth = answers(model, tokenizer, ["w1 w2"], 10)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    assert answers(model, tokenizer, ["w1 w2"], 10) == truth
    assert model.generation_config.repetition_penalty == 9.0


def test_an_empty_prompt_is_named():
    with pytest.raises(PyftError, match="prompt 1 has no tokens"):
        answers(tiny_model(), tiny_tokenizer(), ["w1", ""], 2)


def test_evaluate_joins_loss_and_answers():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = evaluate(model, tokenizer, BATCHES, ["w4"], max_new_tokens=3)
    truth = evaluate_loss(model, BATCHES)
    assert found["loss"] == {
        "mean": truth.mean,
        "low": truth.low,
        "high": truth.high,
        "tokens": 31,
    }
    assert found["perplexity"] == pytest.approx(math.exp(truth.mean))
    assert found["answers"] == answers(model, tokenizer, ["w4"], 3)
    assert evaluate(model, tokenizer, prompts=["w4"])["loss"] is None
