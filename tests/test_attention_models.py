"""attn_implementation="pyft" on whole models: the numbers of "eager", masks, packing, padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON
from torch import Tensor, nn
from transformers import masking_utils

import pyft
from pyft.integrations import attention as integration
from pyft.integrations.masks import Mask, make_mask

SEQ = 24
WINDOW = 5
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
# what attention differs by: windows, softcap, sinks, norms of queries and keys, chunks
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma2": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
    },
    "Mistral": {"sliding_window": WINDOW},
    "Llama4Text": {
        "attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0], "num_local_experts": 2, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64, "use_qk_norm": True,
    },
}  # fmt: skip
# a mask of its own making, which takes the model's for a matrix
MODELS["Doge"] = {"keep_window_size": 2048}
STEPPED = ("Llama", "Qwen3", "Gemma3Text", "GptOss", "Gemma2")


def model_of(name: str, implementation: str, **options: Any) -> Any:
    """The same weights for the same name; sinks are not all alike."""
    config = getattr(transformers, f"{name}Config")(**(COMMON | MODELS[name] | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.data.normal_()
    return model.eval()


def ids_of(batch: int = 2, seq: int = SEQ, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, COMMON["vocab_size"], (batch, seq), generator=draw)


def outcome(model: nn.Module, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Loss and every gradient."""
    model.zero_grad()
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-7, msg=name
        )


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_eager_s(name: str) -> None:
    ids = ids_of()
    expected = outcome(model_of(name, "eager"), ids, input_ids=ids)
    assert_alike(outcome(model_of(name, "pyft"), ids, input_ids=ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPPED)
def test_training_follows_eager(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for implementation in ("eager", "pyft"):
        model = model_of(name, implementation).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[implementation] = []
        for step in range(50):
            ids = ids_of(seed=step % 5)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(float(loss))
    assert losses["eager"][-1] < losses["eager"][0] - 0.3
    assert losses["pyft"] == pytest.approx(losses["eager"], abs=1e-4)


def packed_row(lengths: tuple[int, ...], ids: Tensor) -> dict[str, Tensor]:
    """Sequences one after another in one row, as positions tell."""
    rows = [ids[i, :length] for i, length in enumerate(lengths)]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_the_gradients_of_rows_alone(name: str) -> None:
    lengths = (9, 14, 1, 7)
    ids = ids_of(batch=4)
    model = model_of(name, "pyft")
    packed = packed_row(lengths, ids)
    labels = packed["input_ids"].clone()
    labels[packed["position_ids"] == 0] = -100
    found = outcome(model, labels, **packed)
    counted = sum(length - 1 for length in lengths)
    expected: dict[str, Tensor] = {}
    for i, length in enumerate(lengths):
        row = ids[i : i + 1, :length]
        if length == 1:
            continue
        alone = outcome(model, row, input_ids=row)
        for key, value in alone.items():
            share = value * (length - 1) / counted
            expected[key] = expected[key] + share if key in expected else share
    assert_alike(found, expected)


def test_boundaries_are_found_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is made for each kind of layer, not for each layer."""
    model = model_of("Llama", "pyft", num_hidden_layers=5)
    found: list[Any] = []
    inner = integration.attention

    def watching(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["cu_seqlens_q"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(integration, "attention", watching)
    model(**packed_row((9, 14), ids_of()), use_cache=False)
    assert len(found) == 5
    assert all(cu is found[0] for cu in found)
    assert found[0].tolist() == [0, 9, 23]


def test_boundaries_given_by_a_collator() -> None:
    """TRL's padding-free batches bring them along."""
    packed = packed_row((9, 14), ids_of())
    model = model_of("Llama", "pyft")
    expected = model(**packed, use_cache=False).logits
    cu = torch.tensor([0, 9, 23], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    found = model(**packed, **given, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str) -> None:
    ids, pads = ids_of(), (0, 7)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, slice(0, pad) if side == "left" else slice(SEQ - pad, SEQ)] = 0
    real = mask.bool()
    expected = model_of(name, "eager")(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = model_of(name, "pyft")(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()


def test_padding_between_tokens() -> None:
    """No sequence of its own can be made of it: the matrix is used."""
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, 4:9] = 0
    real = mask.bool()
    expected = model_of("Llama", "eager")(input_ids=ids, attention_mask=mask).logits
    found = model_of("Llama", "pyft")(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GptOss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [0, 7])
def test_generation(name: str, cache: str, pads: int) -> None:
    """Batches padded on the left, one token after another."""
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    texts = [
        model_of(name, implementation).generate(input_ids=ids, attention_mask=mask, **options)
        for implementation in ("eager", "pyft")
    ]
    assert texts[0].shape[1] == SEQ + 8
    assert torch.equal(*texts)


ENCODED = 12  # tokens of an encoder, and of its decoder
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": {
        "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "decoder_start_token_id": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("decoded", [ENCODED, 7])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoders_and_decoders(name: str, side: str, decoded: int) -> None:
    """What a decoder sees of padded encoders, also where both are as long."""
    options = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**options, **ENCODER_DECODERS[name])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, ENCODED), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, slice(4) if side == "left" else slice(ENCODED - 4, ENCODED)] = 0
    labels = torch.randint(3, 64, (2, decoded), generator=draw)
    outcomes = []
    for implementation in ("eager", "pyft"):
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            config, attn_implementation=implementation
        )
        outcomes.append(outcome(model.eval(), labels, input_ids=ids, attention_mask=mask))
    assert_alike(outcomes[1], outcomes[0])


def test_a_tower_that_reads_its_last_row() -> None:
    """Rows of padding are rows as others where all tokens see all: SigLIP takes the last."""
    config = transformers.SiglipTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=ENCODED,
    )  # fmt: skip
    ids = torch.randint(3, 64, (2, ENCODED), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    pooled = []
    for implementation in ("eager", "pyft"):
        torch.manual_seed(0)
        model = transformers.SiglipTextModel._from_config(
            config, attn_implementation=implementation
        )
        pooled.append(model.eval()(input_ids=ids, attention_mask=mask).pooler_output)
    torch.testing.assert_close(pooled[1], pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "positions", [[*range(9), *range(20, 35)], [0] * SEQ, list(range(0, 2 * SEQ, 2))]
)
def test_positions_that_begin_no_sequence(positions: list[int]) -> None:
    """A gap, all the same, every other: one sequence to a model whose cache is on."""
    ids = ids_of()
    inputs = {"input_ids": ids, "position_ids": torch.tensor([positions])}
    expected = model_of("Llama", "eager")(**inputs, use_cache=True).logits
    found = model_of("Llama", "pyft")(**inputs, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_of_one_row_for_any_batch() -> None:
    """Boundaries found for one batch are not another's."""
    model = model_of("GptOss", "pyft")
    positions = torch.tensor([[*range(9), *range(15)]])
    for batch in (2, 3, 1, 2):
        ids = ids_of(batch)
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        rows = positions.expand(batch, -1).clone()
        expected = model(input_ids=ids, position_ids=rows, use_cache=False).logits
        assert torch.equal(found, expected)


def test_what_a_model_does_with_a_mask_itself_is_refused() -> None:
    mask = make_mask(2, 8, 8)
    ones = torch.ones(2, 1, 8, 8)
    uses: tuple[Callable[[], Any], ...] = (
        lambda: mask.dtype, lambda: mask[:, :, 1:], lambda: ones + mask,
        lambda: ones.where(mask, 0), lambda: torch.softmax(mask, -1),
        lambda: mask.masked_fill(ones, 0),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(pyft.UsageError, match=r"set_attn_implementation\('sdpa'\)"):
            use()
    assert not hasattr(mask, "dtype")


def test_a_mask_of_the_user_is_used() -> None:
    """Four dimensions, and a function laid over the causal mask."""
    ids = ids_of()
    seen = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    seen[:, 3] = False
    seen[3, 3] = True
    given = torch.zeros(2, 1, SEQ, SEQ).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model_of("Llama", "eager")(input_ids=ids, attention_mask=given).logits
    found = model_of("Llama", "pyft")(input_ids=ids, attention_mask=given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def dense(function: Callable[..., Any], q_length: int, kv_length: int, **options: Any) -> Tensor:
    options = {"allow_is_causal_skip": False} | options
    seen = masking_utils.sdpa_mask(2, q_length, kv_length, mask_function=function, **options)
    assert isinstance(seen, Tensor)
    return seen.expand(2, 1, q_length, kv_length)


PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal": masking_utils.causal_mask_function,
    "all": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
    "chunks after padding": masking_utils.chunked_causal_mask_function(3, torch.tensor([2, 0])),
    "packed": masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function, POSITIONS, PACKED
    ),
    "packed windows": masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(2), POSITIONS, PACKED
    ),
    "packed chunks": masking_utils.packed_sequence_compatibility_function(
        masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)),
        POSITIONS, PACKED,
    ),
}  # fmt: skip
NOT_TAKEN_APART: dict[str, Callable[..., Any]] = {
    "an image": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]] * 2)),
    ),
    "a prefix": masking_utils.or_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: k < 3
    ),
    "a user's": lambda b, h, q, k: (q - k) % 2 == 0,
}  # fmt: skip


def as_seen(mask: Any, q_length: int, kv_length: int) -> Tensor:
    q, k = torch.empty(2, 1, q_length, 1), torch.empty(2, 1, kv_length, 1)
    bias = mask.as_bias(q, k) if isinstance(mask, Mask) else mask
    assert tuple(mask.shape) == (2, 1, q_length, kv_length)
    return (bias == 0).expand(2, 1, q_length, kv_length)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_taken_apart(name: str, padded: bool) -> None:
    """What is seen is what transformers' own matrix says; of padding, which sees itself, no more is
    said than that real tokens are blind to it.
    """
    padding = PADDING if padded else None
    mask = make_mask(2, 8, 8, mask_function=FUNCTIONS[name], attention_mask=padding)
    assert isinstance(mask, Mask)
    expected = dense(FUNCTIONS[name], 8, 8, attention_mask=padding)
    real = torch.ones(2, 8, dtype=torch.bool) if padding is None else padding
    found = as_seen(mask, 8, 8)
    assert torch.equal(found[real[:, None]], expected[real[:, None]])


@pytest.mark.parametrize("name", NOT_TAKEN_APART)
def test_masks_that_are_not_become_a_matrix(name: str) -> None:
    function = NOT_TAKEN_APART[name]
    mask = make_mask(2, 8, 8, mask_function=function, use_vmap=True)
    assert isinstance(mask, Tensor)
    assert torch.equal(as_seen(mask, 8, 8), dense(function, 8, 8, use_vmap=True))


@pytest.mark.parametrize("name", ["causal", "all", "window"])
def test_masks_beside_a_cache(name: str) -> None:
    """Queries after 5 keys that are kept, in a cache with room for 12."""
    for kv_length in (8, 12):
        mask = make_mask(2, 3, kv_length, q_offset=5, mask_function=FUNCTIONS[name])
        assert isinstance(mask, Mask)
        expected = dense(FUNCTIONS[name], 3, kv_length, q_offset=5)
        assert torch.equal(as_seen(mask, 3, kv_length), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed by another library"])
def test_heads_in_fp32_are_cast(packed: bool) -> None:
    """Norms in fp32, as PEFT's kbit preparation leaves them."""
    model = model_of("Qwen3", "pyft").to(torch.bfloat16)
    layer = model.model.layers[0].self_attn
    heads = [torch.randn(2, 4, SEQ, 16) for _ in range(3)]
    if packed:
        layer.q_proj.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), False)
        layer.config.dtype = torch.bfloat16
    found, _ = integration.attend(layer, *heads, None)
    assert found.dtype == torch.bfloat16
    if packed:
        layer.config.dtype = torch.float32
    else:
        layer.to(torch.float32)
    found, _ = integration.attend(layer, *heads, None)
    assert found.dtype == torch.float32


def test_what_cannot_be_given_is_refused() -> None:
    model = model_of("Llama", "pyft")
    with pytest.raises(pyft.UsageError, match="use 'eager' where output_attentions"):
        model(input_ids=ids_of(), output_attentions=True)
    heads = torch.randn(1, 2, 3, 16)
    layer = model.model.layers[0].self_attn
    with pytest.raises(pyft.UsageError, match="does not know what to do with block_indices"):
        integration.attend(layer, heads, heads, heads, None, block_indices=torch.zeros(1))


def test_a_learned_position_bias() -> None:
    """T5's, with its gradient, beside a packed row."""
    heads = [torch.randn(2, 2, 8, 16) for _ in range(3)]
    bias = torch.randn(1, 2, 8, 8, requires_grad=True)
    layer = nn.Module()
    seen = dense(FUNCTIONS["packed"], 8, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads, bias.masked_fill(~seen, -torch.inf)
    )
    mask = make_mask(2, 8, 8, mask_function=FUNCTIONS["packed"])
    found, _ = integration.attend(layer, *heads, mask, position_bias=bias)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(found.sin().sum(), bias)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), bias)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_apply_sets_it_and_revert_takes_it_back() -> None:
    model = model_of("Gemma3Text", "sdpa")
    ids = ids_of()
    before = outcome(model, ids, input_ids=ids)
    report = pyft.apply(model)
    runs = [entry for entry in report.modules if entry.runs.startswith("pyft.attention")]
    assert [entry.runs for entry in runs] == ["pyft.attention on cpu"]
    assert model.config._attn_implementation == "pyft"
    assert_alike(outcome(model, ids, input_ids=ids), before)
    pyft.apply(model)
    pyft.revert(model)
    assert model.config._attn_implementation == "sdpa"
    after = outcome(model, ids, input_ids=ids)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_without_the_interface_is_left() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    report = pyft.apply(model)
    assert "it does not use transformers' attention interface" in {e.why for e in report.modules}
    assert model.config._attn_implementation == before


def test_loaded_with_it_and_saved_without(tmp_path: Path) -> None:
    """Its name is in no file: the model is loaded as any other where pyft is not."""
    model = model_of("Gemma3Text", "pyft")
    ids = ids_of()
    model.save_pretrained(tmp_path)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="pyft"
    )
    assert again.config._attn_implementation == "pyft"
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "pyft" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation
        != "pyft"
    )
