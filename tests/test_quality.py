"""Data findings against values computed here by other means."""

import io
import json
import random
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyft.errors import UsageError
from pyft.finetune import quality
from pyft.finetune.data import Finding, Row, RowFile, read_rows
from pyft.finetune.model import load_tokenizer
from pyft.finetune.quality import NEAR, Quality, check, check_file, near_pairs
from pyft.finetune.template import IGNORE, NOTES, Encoded

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
WORDS = [f"word{number}" for number in range(400)]
CONTROL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows WORDS; everything else is <unk>."""
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *WORDS, "user", "system"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "</s>", **names})


def chat(line: int, prompt: str, answer: str, system: str | None = None) -> Row:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    start = [{"role": "system", "content": system}] if system else []
    return Row(line, messages=[*start, *turns])


def text_of(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def file_of(rows: list[Row], findings: list[Finding] | None = None) -> RowFile:
    return RowFile(Path("d.jsonl"), "messages", rows, findings or [], len(rows))


def found(result: Quality, code: str) -> tuple[int, list[int]] | None:
    """(count, lines) of the one finding with this code."""
    matching = [finding for finding in result.findings if finding.code == code]
    assert len(matching) <= 1
    return (matching[0].count, matching[0].lines) if matching else None


def true_jaccard(one: str, two: str) -> float:
    sets = []
    for text in (one, two):
        words = text.split()
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_clean_rows_give_no_finding() -> None:
    rows = [chat(n, text_of(n, 20), text_of(1000 + n, 30)) for n in range(1, 60)]
    result = check(file_of(rows), rows[-5:], [])
    assert result.findings == []
    assert result.fatal() == []


def test_exact_duplicates_after_normalisation() -> None:
    rows = [
        chat(1, "What is it?", "A thing."),
        chat(2, "what  IS it?", "a thing.\n"),
        chat(3, "What is it?", "Another."),
        chat(4, "What is it?", "A thing."),
    ]
    result = check(file_of(rows), [], [])
    assert found(result, "exact-duplicate") == (2, [2, 4])
    assert [finding.code for finding in result.fatal()] == ["exact-duplicate"]
    assert found(result, "near-duplicate") is None


def test_rows_of_one_line_are_told_apart() -> None:
    rows = [Row(1, text=text_of(0, 30)), Row(1, text=text_of(1, 30)), Row(1, text=text_of(0, 30))]
    result = check(file_of(rows), [], [])
    assert found(result, "exact-duplicate") == (1, [1])
    assert found(result, "near-duplicate") is None


def test_near_duplicates_are_verified_and_differ_from_exact_ones() -> None:
    base = text_of(0, 60).split()
    close, far = list(base), list(base)
    close[30] = "changed"
    for place in range(0, 60, 6):
        far[place] = f"other{place}"
    assert true_jaccard(" ".join(base), " ".join(close)) >= NEAR
    assert true_jaccard(" ".join(base), " ".join(far)) < NEAR
    rows = [Row(n, text=text_of(100 + n, 60)) for n in range(1, 30)]
    rows += [Row(50, text=" ".join(base)), Row(51, text=" ".join(far))]
    rows += [Row(52, text=" ".join(close)), Row(53, text=" ".join(base).upper())]
    result = check(file_of(rows), [], [])
    assert found(result, "near-duplicate") == (1, [52])
    assert found(result, "exact-duplicate") == (1, [53])
    message = next(f.message for f in result.findings if f.code == "near-duplicate")
    assert "line 52 and line 50" in message


@given(st.integers(0, 10**6), st.integers(0, 25))
@settings(deadline=None, max_examples=40)
def test_near_pairs_agree_with_all_pairs_compared(seed: int, changes: int) -> None:
    order = random.Random(seed)
    texts = []
    for group in range(4):
        base = text_of(seed + group, 50).split()
        texts.append(" ".join(base))
        for place in order.sample(range(50), changes):
            base[place] = order.choice(WORDS)
        texts.append(" ".join(base))
    reported = near_pairs([text.split() for text in texts])
    for i, j in reported:
        assert true_jaccard(texts[i], texts[j]) >= NEAR
    certain = {
        i for i in range(len(texts)) for j in range(i) if true_jaccard(texts[i], texts[j]) >= 0.9
    }
    assert certain <= {i for i, _ in reported}


def test_near_pairs_finds_nearly_all_at_the_threshold() -> None:
    texts, near = [], 0
    for seed in range(200):
        base = text_of(seed, 100).split()
        other = list(base)
        for place in (20, 50, 80):
            other[place] = "changed"
        similarity = true_jaccard(" ".join(base), " ".join(other))
        near += similarity >= NEAR
        assert 0.8 <= similarity < 0.86
        texts += [base, other]
    pairs = near_pairs(texts)
    assert all((i, j) == (i, i - 1) and i % 2 for i, j in pairs)
    assert len(pairs) >= 0.96 * near
    assert near_pairs(texts) == pairs


def test_a_fixed_instruction_makes_no_near_duplicates() -> None:
    instruction = text_of(5, 200)
    rows = [
        chat(n, f"{instruction} {text_of(n + 10, 12)}", text_of(n + 500, 8)) for n in range(1, 40)
    ]
    assert check(file_of(rows), [], []).findings == []
    turns = rows[0].messages or []
    repeated = chat(40, turns[0]["content"], turns[1]["content"] + " more")
    result = check(file_of([*rows, repeated]), [], [])
    assert found(result, "near-duplicate") == (1, [40])


def test_system_messages_make_no_near_duplicates() -> None:
    system = text_of(5, 200)
    rows = [chat(n, text_of(n, 10), text_of(n + 500, 8), system) for n in range(1, 10)]
    assert check(file_of(rows), [], []).findings == []


def test_scripts_without_spaces() -> None:
    base = "日本語の文章は単語の間に空白を置かないので文字ごとに比べる必要があります" * 2
    rows = [Row(1, text=base), Row(2, text=base + "。"), Row(3, text="まったく違う内容の文です。")]
    assert found(check(file_of(rows), [], []), "near-duplicate") == (1, [2])


def test_leaks_between_training_and_validation() -> None:
    train = [chat(n, text_of(n, 30), text_of(900 + n, 40)) for n in range(1, 21)]
    turns = [row.messages or [] for row in train]
    near = turns[1][1]["content"].split()
    near[5] = "changed"
    validation = [
        chat(1, turns[0][0]["content"].upper(), turns[0][1]["content"]),
        chat(2, turns[1][0]["content"], " ".join(near)),
        chat(3, turns[2][0]["content"], text_of(7001, 40)),
        chat(4, text_of(7002, 30), turns[3][1]["content"]),
        chat(5, text_of(7003, 30), text_of(7004, 40)),
    ]
    result = check(file_of(train), validation, [])
    assert found(result, "leak-exact") == (1, [1])
    assert found(result, "leak-near") == (1, [2])
    assert found(result, "leak-prompt") == (2, [2, 3])
    assert found(result, "leak-answer") == (1, [4])
    severities = {finding.code: finding.severity for finding in result.findings}
    assert severities == {
        "leak-exact": "error",
        "leak-near": "warning",
        "leak-answer": "warning",
        "leak-prompt": "info",
    }
    assert result.findings[0].severity == "error"
    assert "line 4 and line 4" in next(
        f.message for f in result.findings if f.code == "leak-answer"
    )
    clean = check(file_of(train), validation[4:], [])
    assert clean.findings == []


def test_common_short_answers_are_no_leak() -> None:
    rows = [chat(n, text_of(n, 30), "positive" if n % 2 else "negative") for n in range(1, 41)]
    assert check(file_of(rows), rows[30:], []).findings == []


def test_without_datasketch_the_rest_is_checked_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    rows = [Row(1, text="a b c d"), Row(2, text="a b c d")]
    result = check(file_of(rows), [], [])
    assert [f.code for f in result.findings] == ["exact-duplicate", "near-not-checked"]
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extra = re.search(r"pip install 'pyft\[(\w+)\]'", result.findings[1].message)
    needed = project["optional-dependencies"][extra[1]] if extra else []
    assert any(requirement.startswith("datasketch") for requirement in needed)


def encoded(line: int, total: int, supervised: int, cut: int = 0, lost: int = 0) -> Encoded:
    labels = [IGNORE] * (total - supervised) + [3] * supervised
    return Encoded([3] * total, labels, line, cut, lost)


def test_truncation_and_supervised_tokens_lost() -> None:
    items = [
        encoded(1, 10, 5),
        encoded(2, 10, 4, cut=7, lost=6),
        encoded(3, 10, 0, cut=5, lost=5),
        encoded(4, 9, 1),
    ]
    result = check(file_of([Row(1, text="x")]), [], items)
    assert found(result, "truncated") == (2, [2, 3])
    message = next(f.message for f in result.findings if f.code == "truncated")
    assert "losing 11 of 21 supervised tokens" in message
    assert "longest row has 17 tokens" in message
    assert found(result, "nothing-supervised") == (1, [3])
    assert found(result, "short-answer") == (1, [4])
    assert result.findings[0].code == "nothing-supervised"


def test_notes_of_the_template_become_findings() -> None:
    items = [
        Encoded([1, 2, 2, 2], [IGNORE, 2, 2, 2], n, notes=(code,)) for n, code in enumerate(NOTES)
    ]
    result = check(file_of([Row(1, text="x")]), [], items)
    assert {f.code: (f.count, f.lines, f.severity) for f in result.findings} == {
        code: (1, [n], NOTES[code][0]) for n, code in enumerate(NOTES)
    }


def test_lengths_are_nearest_rank_percentiles_and_a_whole_histogram() -> None:
    lengths = [*range(2, 101), 300]
    items = [
        encoded(n, length - (length > 200) * 50, 4, cut=(length > 200) * 50)
        for n, length in enumerate(lengths)
    ]
    summary = check(file_of([Row(1, text="x")]), [], items).lengths
    assert (summary["p50"], summary["p90"], summary["p99"], summary["max"]) == (51, 91, 100, 300)
    assert (summary["unit"], summary["rows"]) == ("tokens", 100)
    for low, high, count in summary["histogram"]:
        assert count == sum(low <= length < high for length in lengths)
    assert sum(count for _, _, count in summary["histogram"]) == 100
    assert len(summary["histogram"]) <= quality.BINS


def test_tokenizer_findings() -> None:
    rows = [
        chat(1, "word1 word2", "word3"),
        chat(2, "word1 <|im_end|>", "word4"),
        Row(3, text="word5 </s>"),
    ]
    known = Encoded([5, 6, 7], [IGNORE, 6, 7], 1)
    unknown = Encoded([5, 2, 2], [IGNORE, 2, 2], 2)
    names = {"unk_token": "<unk>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    result = check(file_of(rows), [], [known, unknown], tokenizer(**names))
    assert found(result, "unknown-tokens") == (1, [2])
    assert "33.33%" in next(f.message for f in result.findings if f.code == "unknown-tokens")
    control = [(f.severity, f.lines) for f in result.findings if f.code == "control-token"]
    assert control == [("warning", [2]), ("info", [3])]
    assert found(result, "pad-is-eos") is None
    same = check(file_of(rows[:1]), [], [known], tokenizer(pad_token="</s>"))
    assert found(same, "pad-is-eos") == (0, [])
    assert same.fatal() == []
    bare = tokenizer()
    bare.eos_token = None
    assert found(check(file_of(rows[:1]), [], [known], bare), "no-eos") == (0, [])


def test_unknown_that_is_also_eos_is_not_unknown() -> None:
    item = Encoded([5, 1], [IGNORE, 1], 1)
    rows = [chat(1, "word1", "word2")]
    result = check(file_of(rows), [], [item], tokenizer(unk_token="</s>"))
    assert found(result, "unknown-tokens") is None


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_check_file_reads_splits_and_encodes(tmp_path: Path) -> None:
    rows = [{"prompt": text_of(n, 12), "completion": text_of(n + 50, 30)} for n in range(20)]
    path = write(tmp_path / "d.jsonl", [*rows, rows[0], {"prompt": "x"}])
    result = check_file(path, tokenizer(), max_length=40)
    assert found(result, "missing-key") == (1, [22])
    assert found(result, "exact-duplicate") == (1, [21])
    assert found(result, "leak-exact") is None
    # <|im_start|> user, 12 words, end, start, assistant, 30 words, end: 48 tokens; 40 are kept
    assert found(result, "truncated") == (21, list(range(1, 21)))
    message = next(f.message for f in result.findings if f.code == "truncated")
    assert f"losing {8 * 21} of {31 * 21} supervised tokens" in message
    assert result.lengths["max"] == 48
    plain = check_file(path)
    assert (plain.lengths["unit"], plain.lengths["max"]) == ("words", 42)
    assert found(plain, "truncated") is None


def test_check_file_with_a_validation_file(tmp_path: Path) -> None:
    rows = [{"prompt": text_of(n, 12), "completion": text_of(n + 50, 30)} for n in range(20)]
    path = write(tmp_path / "d.jsonl", rows)
    held = write(tmp_path / "v.jsonl", [{"prompt": "x"}, rows[7]])
    result = check_file(path, validation=held)
    assert found(result, "leak-exact") == (1, [2])
    assert found(result, "missing-key") == (1, [1])
    assert "v.jsonl" in next(f.message for f in result.findings if f.code == "missing-key")
    with pytest.raises(UsageError, match="no such file"):
        check_file(tmp_path / "none.jsonl")


def test_check_file_takes_the_directory_of_a_model() -> None:
    directory = Path(quality.__file__).parent.parent / "embedded" / "model"
    path = directory.parent / "general.jsonl"
    result = check_file(path, directory, max_length=64, validation=0)
    longest = check_file(path, load_tokenizer(directory), max_length=64, validation=0).lengths
    assert result.lengths == longest
    assert (result.lengths["unit"], result.lengths["max"]) == ("tokens", 64)
    with pytest.raises(UsageError):
        check_file(path, directory.parent / "none")


def test_table_and_dict() -> None:
    findings = [Finding("bad-code", "error", 30, "30 rows [x]: fix", list(range(1, 21)))]
    rows = [Row(n, text=text_of(n, 20)) for n in range(1, 8)]
    result = check(file_of(rows, findings), [], [])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table())
    shown = console.export_text()
    for part in ("error", "bad-code", "30 rows [x]: fix", "1, 2, 3, 4, 5, ...", "p50 20"):
        assert part in shown
    console.print(Quality([], {}).table())
    assert "nothing found" in console.export_text()
    back = json.loads(json.dumps(result.to_dict()))
    assert back["findings"][0]["lines"] == list(range(1, 21))
    assert back["lengths"]["max"] == 20


def test_findings_of_a_real_file_are_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\nnope\n5\n{"text": "a"}\n', encoding="utf-8")
    result = check(read_rows(path), [], [])
    assert [f.code for f in result.findings] == [
        "invalid-json",
        "not-an-object",
        "empty-row",
        "exact-duplicate",
    ]
    assert all("\n" not in f.message and ": " in f.message for f in result.findings)
