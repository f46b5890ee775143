"""The embedded default: the shipped model, tokenizer and text, the rows from docstrings."""

from __future__ import annotations

import importlib
import json
import math
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyft.embedded import GENERAL_TEXT, MODEL_DIR, corpus, docstrings, pretrain

MEBI = 1 << 20
SAMPLES = [
    "",
    " ",
    "\n\n",
    "def fill(text, width=70):\n    return '\\n'.join(wrap(text, width))\n",
    "  leading and trailing spaces   \n\tand a tab\r\n",
    "naïve café, 日本語, 🎉🎉, \u00a0 and \u200b and \x00",
    "====-----.......########        x",
    'for i in range(10):\n        print(f"{i:>4}")\n\n\n# done',
    "<|user|>hello<|end|><|assistant|>x<|end|> <|system|>",
]


def _no_network(*args: object) -> None:
    raise AssertionError("a network connection was tried")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """(model in fp32, tokenizer), loaded while every connection raises."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _no_network)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def pieces() -> Any:
    """The sentencepiece model itself."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))


@pytest.fixture(scope="module")
def passages() -> list[str]:
    """The shipped general text."""
    lines = GENERAL_TEXT.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def entries() -> tuple[docstrings.Entry, ...]:
    """The documented objects of the running Python."""
    return docstrings.collect()


def test_shipped_files_are_small_and_licensed() -> None:
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 12_000_000
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 12 * MEBI
    licence = (MODEL_DIR.parent / "LICENSE-python-docs.txt").read_text(encoding="utf-8")
    assert "PSF LICENSE AGREEMENT FOR PYTHON 3.11.2" in licence
    assert "ZERO-CLAUSE BSD" in licence
    notice = (MODEL_DIR.parent / "NOTICE").read_text(encoding="utf-8")
    assert "Python Software Foundation" in notice
    assert "python3.11-doc" in notice


def test_model_is_a_small_llama_in_bf16(loaded: tuple[Any, Any]) -> None:
    from safetensors import safe_open

    model, tokenizer = loaded
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_special_tokens_are_distinct_and_end_generation(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id, end]
    assert len(set(ids)) == len(ids)
    assert tokenizer.pad_token == "<pad>"
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, end}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", SAMPLES)
def test_both_tokenizers_agree_on_samples(text: str, loaded: tuple[Any, Any], pieces: Any) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text


def test_both_tokenizers_agree_on_sources(loaded: tuple[Any, Any], pieces: Any) -> None:
    tokenizer = loaded[1]
    for name in ("textwrap", "json.decoder", "datetime", "string"):
        text = Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 2


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])),
        st.text(st.sampled_from(" \n\t=-._#aeinrst()\"'é日"), max_size=60),
    ).filter(lambda text: not re.search(r"<(unk|s|/s|pad|0x..)>", text))
)
def test_both_tokenizers_agree_on_any_text(loaded: tuple[Any, Any], pieces: Any, text: str) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text


def test_chat_template_marks_the_answer(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 1?"},
        {"role": "assistant", "content": "A number."},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "Too."},
    ]
    question = "<s><|system|>Be short.<|end|><|user|>What is 1?<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        question + "A number.<|end|><|user|>And 2?<|end|><|assistant|>Too.<|end|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == question
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = tokenizer.decode([index for index, mask in pairs if mask])
    assert marked == "A number.<|end|>Too.<|end|>"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_general_text_is_prose_of_held_out_documents(passages: list[str]) -> None:
    rows = [json.loads(line) for line in GENERAL_TEXT.read_text(encoding="utf-8").splitlines()]
    assert {row["source"] for row in rows} <= set(corpus.HELD_OUT)
    assert len({row["source"] for row in rows}) >= 8
    assert 64 <= len(passages) == len(set(passages)) <= 200
    assert all(500 <= len(text) <= 1500 for text in passages)
    letters = sum(c.isalpha() or c.isspace() for text in passages for c in text)
    assert letters > 0.85 * sum(map(len, passages))


@torch.no_grad()
def test_model_has_learned_the_language(loaded: tuple[Any, Any], passages: list[str]) -> None:
    """Held-out loss is far below what the frequencies of the held-out tokens alone would allow."""
    model, tokenizer = loaded
    total, seen = 0.0, Counter[int]()
    for text in passages[::8]:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))) * len(
            ids[1:]
        )
        seen.update(ids[1:])
    count = seen.total()
    unigram = -sum(n * math.log(n / count) for n in seen.values()) / count
    assert total / count < 0.8 * unigram


def test_rows_are_many_unique_and_well_formed(entries: tuple[docstrings.Entry, ...]) -> None:
    rows = docstrings.build_rows()
    assert len(rows) >= 3000
    assert len({json.dumps(row) for row in rows}) == len(rows)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(m["content"] == m["content"].strip() != "" for m in row["messages"])
    assert len({entry.summary.lower() for entry in entries}) == len(entries)
    assert {entry.kind for entry in entries} == {"function", "method", "class", "module"}


def test_rows_depend_on_the_seed_alone() -> None:
    first, again, other = (docstrings.build_rows(seed) for seed in (0, 0, 1))
    assert first == again
    assert docstrings.collect.__wrapped__() == docstrings.collect()
    assert first != other
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, other))


def test_objects_of_one_name_are_on_one_side_of_the_split(
    entries: tuple[docstrings.Entry, ...],
) -> None:
    train, held_out = docstrings.build_split(seed=3, held_out=0.1)
    owner = {json.dumps(row): entry.name for entry in entries for row in docstrings.rows_of(entry)}
    sides = [{owner[json.dumps(row)] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    last_names = [{name.rpartition(".")[2].lower() for name in side} for side in sides]
    assert not last_names[0] & last_names[1]
    assert 0.1 <= len(sides[1]) / len(entries) < 0.13
    assert len(train) + len(held_out) == len(owner)


def test_answers_are_the_library_s_own_words(entries: tuple[docstrings.Entry, ...]) -> None:
    import inspect
    import textwrap

    named = {entry.name: entry for entry in entries}
    entry = named["textwrap.fill"]
    assert entry.call == "textwrap.fill(text, width=70, **kwargs)"
    first = " ".join(str(inspect.getdoc(textwrap.fill)).split("\n\n")[0].split())
    assert entry.summary == first
    explain, arguments, find = (row["messages"] for row in docstrings.rows_of(entry))
    assert explain[0]["content"] == "What does `textwrap.fill` do?"
    assert explain[1]["content"] == f"`{entry.call}`\n\n{first}"
    assert arguments[1]["content"].splitlines()[2:] == [
        "- `text`: required",
        "- `width`: `70` by default",
        "- `**kwargs`: any further keyword arguments",
    ]
    assert find[0]["content"].endswith(first)
    assert find[1]["content"] == f"`{entry.call}`"
    assert named["len"].call == "len(obj, /)"
    assert named["str.splitlines"].call == "str.splitlines(keepends=False)"
    assert named["json"].kind == "module"


def test_signatures_agree_with_inspect(entries: tuple[docstrings.Entry, ...]) -> None:
    """Parameter names read from the sources are those that the imported functions have."""
    import inspect

    checked = 0
    for entry in entries:
        module, _, name = entry.name.rpartition(".")
        if entry.kind != "function" or module not in {"textwrap", "shutil", "statistics", "json"}:
            continue
        function = inspect.unwrap(getattr(importlib.import_module(module), name))
        names = [
            str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
            for parameter in inspect.signature(function).parameters.values()
        ]
        assert [parameter for parameter, _ in entry.parameters] == names
        checked += 1
    assert checked > 30


def test_write_rows_writes_jsonl(tmp_path: Path) -> None:
    rows = docstrings.build_rows()[:5]
    assert docstrings.write_rows(tmp_path / "rows.jsonl", rows) == 5
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_cleaning_keeps_code_and_drops_bookkeeping() -> None:
    source = """.. _label:

:mod:`textwrap` --- Wrapping
============================

.. index::
   single: text
   pair: a; b

See :meth:`~list.sort`, :func:`the function <fill>` and ``x = 1``::

    if x:
        y = '``'

.. sectionauthor:: Somebody <a@b.c>
.. function:: fill(text)

   Fills.
"""
    assert corpus.clean(source) == (
        "# `textwrap` --- Wrapping\n\n"
        "See `sort`, the function and `x = 1`:\n\n"
        "    if x:\n        y = '`'\n\n"
        ".. function:: fill(text)\n\n   Fills.\n"
    )


def test_held_out_documents_stay_out_of_training(tmp_path: Path) -> None:
    repeated, own = "Said twice by Python. " * 30, "Said here alone, once. " * 30
    for name in ("library/a", "faq/design", "license", "whatsnew/changelog"):
        path = tmp_path / f"{name}.rst.txt"
        path.parent.mkdir(exist_ok=True)
        texts = [repeated, "x = 1"] + ([own] if name == "faq/design" else [])
        path.write_text("\n\n".join(texts), encoding="utf-8")
    train, held_out = corpus.read_documents(tmp_path)
    assert [document.name for document in train] == ["library/a"]
    assert [document.name for document in held_out] == ["faq/design"]
    rows = corpus.general_text(held_out, train)
    assert rows == [{"text": own.strip(), "source": "faq/design"}]
    assert len(corpus.general_text(held_out, [])) == 2
    with pytest.raises(FileNotFoundError, match=r"no \*\.rst\.txt below"):
        corpus.read_documents(tmp_path / "nothing")


def test_windows_cut_the_joined_documents() -> None:
    documents = [torch.arange(start, start + 100) for start in range(0, 1000, 100)]
    generator = torch.Generator().manual_seed(0)
    windows = list(pretrain.windows(documents, generator, 64))
    seen = torch.cat(windows).tolist()
    assert {len(window) for window in windows} == {64}
    assert len(windows) in (14, 15)
    assert len(set(seen)) == len(seen)
    inside = [bool(((w[1:] - w[:-1] == 1) | (w[1:] % 100 == 0)).all()) for w in windows]
    assert all(inside)


def test_learning_rate_warms_up_and_falls_to_a_twentieth() -> None:
    assert pretrain.learning_rate(2.0, 0.01) == pytest.approx(1.0)
    assert pretrain.learning_rate(2.0, 0.02) == pytest.approx(2.0)
    assert pretrain.learning_rate(2.0, 0.51) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5))
    assert pretrain.learning_rate(2.0, 1.0) == pytest.approx(0.1)


def test_pretraining_writes_a_checkpoint_and_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passages: list[str]
) -> None:
    for index, name in enumerate(["library/a", "library/b", "faq/design"]):
        path = tmp_path / "docs" / f"{name}.rst.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(passages[index::3][:8]), encoding="utf-8")
    losses = []
    for extra in ([], ["--start-from", str(tmp_path / "model")]):
        options = ["--docs", str(tmp_path / "docs"), "--output", str(tmp_path / "model")]
        options += [
            "--tokens",
            "5000",
            "--lr",
            "5e-3",
            "--batch-tokens",
            "1024",
            "--vocab-size",
            "512",
        ]
        options += ["--threads", "1", *extra]
        monkeypatch.setattr("sys.argv", ["pretrain", *options])
        losses.append(pretrain.main()["held_out_loss"])
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert written == {path.name for path in MODEL_DIR.iterdir()}
    assert losses[1] < losses[0] - 0.1
    rows = (tmp_path / "general.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["source"] for row in rows} == {"faq/design"}


def test_pretraining_without_a_budget_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--docs", "a", "--output", "b"])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert "no budget: give --tokens, --minutes or both" in capsys.readouterr().err
