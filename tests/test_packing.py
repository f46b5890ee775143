"""Packing: every sequence once, and no sequence that sees another, in any architecture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pyft.finetune.packing import PackedDataset, collate, isolates, pack
from pyft.finetune.template import IGNORE, Encoded

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than the sequences, so that windows and packing meet
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral window": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "phi3 window": (Phi3ForCausalLM, Phi3Config, {"sliding_window": WINDOW}),
}


def build(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config_class, extra = ARCHITECTURES[name]
    config = config_class(**{**SHAPE, **extra})
    config._attn_implementation = attention
    model = model_class(config).float()
    with torch.no_grad():  # larger than the usual start, so that attention is far from uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def sequences(*lengths: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for line, length in enumerate(lengths, start=1):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORE, *ids[1:]], line))
    return made


LENGTHS = (9, 1, 7, 12, 3, 1)
BINS = [[0, 1, 2], [3, 5, 4]]  # 17 and 16 tokens: the second row gets a tail


def batch_of(encoded: list[Encoded]) -> dict[str, torch.Tensor]:
    data = PackedDataset(encoded, BINS, 17)
    return collate([data[0], data[1]], pad_id=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_a_packed_sequence_are_those_of_the_sequence_alone(
    name: str, attention: str
) -> None:
    model = build(name, attention).eval()
    encoded = sequences(*LENGTHS)
    batch = batch_of(encoded)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        assert torch.isfinite(packed).all()
        for row, members in enumerate(BINS):
            start = 0
            for member in members:
                ids = torch.tensor([encoded[member].input_ids])
                alone = model(input_ids=ids, use_cache=False).logits[0]
                end = start + ids.shape[1]
                torch.testing.assert_close(packed[row, start:end], alone, atol=1e-5, rtol=1e-5)
                start = end
        only = {key: value[:1] for key, value in batch.items()}
        single = model(**only, use_cache=False).logits
    torch.testing.assert_close(single[0], packed[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_isolates_is_true_where_restarted_positions_are_read(name: str) -> None:
    model = build(name, "sdpa").train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert isolates(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_isolates_is_false_where_they_are_not(name: str) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0}
    model: PreTrainedModel
    if name == "opt":
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        model = OPTForCausalLM(OPTConfig(**common, **shape, ffn_dim=48))
    else:
        model = BloomForCausalLM(BloomConfig(**common, n_layer=2, n_head=4))
    assert not isolates(model)


def test_the_isolation_test_can_fail() -> None:
    model = build("llama", "sdpa").eval()
    encoded = sequences(*LENGTHS)
    batch = batch_of(encoded)
    ids = torch.tensor([encoded[2].input_ids])
    ones = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        mixed = model(**batch, attention_mask=ones, use_cache=False).logits[0, 10:17]
        alone = model(input_ids=ids, use_cache=False).logits[0]
    assert (mixed - alone).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral window", "phi3"])
def test_gradients_under_checkpointing_are_the_sum_of_those_of_each_sequence(name: str) -> None:
    model = build(name, "sdpa").train()
    encoded = sequences(*LENGTHS)

    def total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    for item in encoded:
        ids = torch.tensor([item.input_ids])
        if ids.shape[1] > 1:
            total(model(input_ids=ids, use_cache=False).logits, ids).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(encoded)
    loss = total(model(**batch, use_cache=False).logits, batch["labels"])
    loss.backward()
    for key, parameter in model.named_parameters():
        if key in expected:
            scale = expected[key].abs().max().item() + 1e-6
            difference = (parameter.grad - expected[key]).abs().max().item()
            assert difference <= 1e-4 * scale, key


@given(
    st.lists(st.integers(1, 50), max_size=60),
    st.integers(50, 120),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_every_index_once_and_no_row_too_long(
    lengths: list[int], max_length: int, seed: int, packed: bool
) -> None:
    rows = pack(lengths, max_length, seed, packed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= max_length for total in sums)
    assert pack(lengths, max_length, seed, packed) == rows
    if not packed:
        assert all(len(row) == 1 for row in rows)
    elif len(sums) > 1:  # any two rows together are too long, or best fit would have joined them
        assert sum(sorted(sums)[:2]) > max_length


def test_packing_is_tight_and_the_seed_orders_it() -> None:
    lengths = [7, 3, 6, 4, 5, 5, 8, 2, 9, 1]
    assert len(pack(lengths, 10, seed=0)) == 5  # the sum is 50
    orders = {tuple(map(tuple, pack(lengths, 10, seed))) for seed in range(8)}
    assert len(orders) == 8
    assert len({tuple(map(tuple, pack(lengths, 10, seed, False))) for seed in range(8)}) == 8
    assert pack([], 10, 0) == []


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_does_not_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a sequence of {length} tokens"):
        pack([3, length], 10, 0)


def test_items_and_batches_by_hand() -> None:
    encoded = [
        Encoded([11, 12, 13], [11, IGNORE, 13], 1),  # a first label that must not survive
        Encoded([21, 22], [IGNORE, 22], 2),
        Encoded([31], [IGNORE], 3),
    ]
    data = PackedDataset(encoded, [[1, 0], [2]], 5)
    assert len(data) == 2
    assert data[0] == {
        "input_ids": [21, 22, 11, 12, 13],
        "labels": [IGNORE, 22, IGNORE, IGNORE, 13],
        "position_ids": [0, 1, 0, 1, 2],
    }
    batch = collate([data[0], data[1]], pad_id=13)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[21, 22, 11, 12, 13], [31, 13, 13, 13, 13]]
    assert batch["labels"].tolist()[1] == [IGNORE] * 5
    assert batch["labels"].tolist()[0][4] == 13  # supervised, though it is the padding id
    assert batch["position_ids"].tolist()[1] == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 tokens is over max_length 4"):
        PackedDataset(encoded, [[1, 0]], 4)
