"""`pyft eval`: rows, prompts alone, what was dropped or cut, and wrong options."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pyft import embedded
from pyft.errors import UsageError
from pyft.finetune import evaluation
from pyft.finetune.evaluation import Settings, evaluate_files, show

ANSWERED = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(3)]
PROMPTS = [{"prompt": "What is a list?"}, {"prompt": "What does [/INST] mean?"}]


def settings(directory: Path, rows: list[dict], **options: object) -> Settings:
    path = directory / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    few = Settings(embedded.MODEL_DIR, path, dtype="fp32", answers=2, max_new_tokens=3)
    return replace(few, **options)


def printed(result: dict) -> str:
    text = io.StringIO()
    Console(file=text, width=400).print(show(result))
    return text.getvalue()


def test_a_file_of_prompts_is_answered_without_a_loss(tmp_path):
    messages = {"messages": [{"role": "user", "content": PROMPTS[0]["prompt"]}]}
    result = evaluate_files(settings(tmp_path, PROMPTS))
    assert (result["loss"], result["perplexity"]) == (None, None)
    assert (result["rows"], result["prompts"], result["findings"]) == (0, 2, [])
    assert [row["expected"] for row in result["answers"]] == [None, None]
    for row, prompt in zip(result["answers"], PROMPTS, strict=True):
        assert prompt["prompt"] in row["prompt"]
        assert not row["prompt"].endswith("-")
    text = printed(result)
    assert "2 rows without an answer: no loss on them" in text
    assert "[/INST]" in text
    assert "nats" not in text
    assert "--answers" not in text
    first = printed({**result, "answers": result["answers"][:1]})
    assert "the first 1 are answered; --answers 2 answers all" in first
    # a prompt is the same with and without an answer beside it
    same = evaluate_files(settings(tmp_path, [{**PROMPTS[0], "completion": "A sequence."}]))
    assert same["answers"][0]["prompt"] == result["answers"][0]["prompt"]
    assert same["answers"][0]["answer"] == result["answers"][0]["answer"]
    assert evaluate_files(settings(tmp_path, [messages]))["answers"] == result["answers"][:1]


def test_loss_is_of_the_rows_with_answers(tmp_path):
    alone = evaluate_files(settings(tmp_path, ANSWERED, answers=0))
    mixed = evaluate_files(settings(tmp_path, [PROMPTS[0], *ANSWERED, PROMPTS[1]]))
    assert mixed["loss"] == alone["loss"]
    assert (mixed["rows"], mixed["prompts"]) == (3, 2)
    assert [row["expected"] for row in mixed["answers"]] == [None, "It is 0."]


def test_dropped_and_cut_rows_are_told(tmp_path):
    long = {"prompt": "Count.", "completion": " ".join(map(str, range(100)))}
    rows = [*ANSWERED, {"prompt": " ", "completion": "no"}, long]
    result = evaluate_files(settings(tmp_path, rows, max_length=64, answers=0))
    codes = {finding["code"]: finding["lines"] for finding in result["findings"]}
    assert codes["empty-prompt"] == [4]
    assert codes["truncated"] == [5]
    whole = evaluate_files(settings(tmp_path, rows, answers=0))
    assert whole["truncated"] == {"rows": 0, "supervised_lost": 0}
    lost = whole["loss"]["tokens"] - result["loss"]["tokens"]
    assert lost > 0
    assert result["truncated"] == {"rows": 1, "supervised_lost": lost}
    text = printed(result)
    assert "error: 1 row with an empty prompt" in text
    assert f"warning: 1 row cut at max_length, losing {lost} of" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("answers", -1, "--answers: -1 is not a whole number from 0 up"),
        ("max_new_tokens", 0, "--max-new-tokens: 0 is not a whole number from 1 up"),
        ("max_length", 1, "--max-length: 1 is not a whole number from 8"),
        ("dtype", "fp16", "dtype: fp16 needs a GPU; write bf16, fp32 or auto"),
    ],
)
def test_wrong_options_are_refused_before_loading(tmp_path, monkeypatch, option, value, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluation, "load", lambda settings: pytest.fail("loaded"))
    with pytest.raises(UsageError) as refused:
        evaluate_files(settings(tmp_path, ANSWERED, **{option: value}))
    assert str(refused.value).startswith(words)


def test_nothing_to_measure_is_refused_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load", lambda settings: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="no row has an answer, so --answers must be above 0"):
        evaluate_files(settings(tmp_path, PROMPTS, answers=0))
    far = [{"prompt": "word " * 200, "completion": "yes"}]
    with pytest.raises(UsageError, match="within 32 tokens to measure the loss on"):
        evaluate_files(settings(tmp_path, far, max_length=32))


@pytest.mark.parametrize(("isolated", "packed"), [(True, 1), (False, 3)])
def test_a_model_that_mixes_packed_rows_gets_them_one_by_one(
    tmp_path, monkeypatch, isolated, packed
):
    seen = []

    def watch(model, tokenizer, batches, *rest):
        seen.append(len(list(batches)))
        return {"loss": None, "perplexity": None, "answers": []}

    monkeypatch.setattr(evaluation, "isolates", lambda model: isolated)
    monkeypatch.setattr(evaluation, "evaluate", watch)
    evaluate_files(settings(tmp_path, ANSWERED, answers=0))
    assert seen == [packed]
