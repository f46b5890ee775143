"""Reading data files: shapes, bad rows with their lines, unusable files, and the split."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyft.errors import UsageError
from pyft.finetune.data import PROBLEMS, Row, read_rows, row_key, split

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(*messages: object) -> dict:
    return {"messages": list(messages)}


SAME_ROW = {
    "messages": chat(USER, ANSWER),
    "prompt_completion": {"prompt": "What is 2 + 2?", "completion": "4"},
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "gpt", "value": "4"},
        ]
    },
}


@pytest.mark.parametrize("shape", SAME_ROW)
def test_each_chat_shape_is_detected_and_gives_the_same_row(tmp_path: Path, shape: str) -> None:
    file = read_rows(write(tmp_path / "d.jsonl", SAME_ROW[shape], SAME_ROW[shape]))
    assert (file.shape, file.total, file.findings) == (shape, 2, [])
    assert file.rows == [Row(1, messages=[USER, ANSWER]), Row(2, messages=[USER, ANSWER])]
    assert read_rows(tmp_path / "d.jsonl", shape).rows == file.rows


def test_text_lines_and_text_files(tmp_path: Path) -> None:
    file = read_rows(write(tmp_path / "d.jsonl", {"text": "one"}, {"text": "two"}))
    assert (file.shape, file.rows) == ("text", [Row(1, text="one"), Row(2, text="two")])
    plain = tmp_path / "d.txt"
    plain.write_bytes(b"\xef\xbb\xbf\r\nfirst line\r\nsecond line\r\n\r\n \r\nother\r\n")
    file = read_rows(plain)
    assert file.shape == "text"
    assert file.rows == [Row(2, text="first line\nsecond line"), Row(6, text="other")]


def test_alpaca_joins_input_and_takes_a_system_text(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    row = read_rows(write(tmp_path / "d.jsonl", record)).rows[0]
    assert row.messages == [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}, ANSWER]


def test_prompt_may_be_messages_and_content_may_be_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    record = {
        "prompt": [SYSTEM, {"role": "user", "content": parts}],
        "completion": [ANSWER],
    }
    assert read_rows(write(tmp_path / "d.jsonl", record)).rows[0].messages == [SYSTEM, USER, ANSWER]


def test_sharegpt_roles(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *SAME_ROW["sharegpt"]["conversations"]]
    row = read_rows(write(tmp_path / "d.jsonl", {"conversations": turns})).rows[0]
    assert row.messages == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ('{"messages": [', "invalid-json"),
        ("[" * 100_000, "invalid-json"),
        ("[1, 2]", "not-an-object"),
        ('"words"', "not-an-object"),
        ("", "empty-row"),
        ({}, "empty-row"),
        ({"messages": []}, "empty-row"),
        ({"text": "of another shape"}, "other-shape"),
        ({"message": [USER, ANSWER]}, "missing-key"),
        (chat({"role": "user", "content": 5}, ANSWER), "not-text"),
        (chat({"role": "user", "content": [{"type": "image"}]}, ANSWER), "not-text"),
        ({"messages": "hello"}, "not-text"),
        (chat({"role": "user", "content": "\ud800"}, ANSWER), "invalid-unicode"),
        (chat({"role": "king", "content": "x"}, ANSWER), "unknown-role"),
        (chat({"content": "x"}, ANSWER), "unknown-role"),
        (chat(USER, {"role": "tool", "content": "x"}, ANSWER), "tool-role"),
        (
            chat(USER, {"role": "assistant", "content": None, "tool_calls": [1]}, ANSWER),
            "tool-role",
        ),
        (chat(USER, USER, ANSWER), "role-order"),
        (chat(USER, ANSWER, ANSWER), "role-order"),
        (chat(ANSWER, USER, ANSWER), "role-order"),
        (chat(USER, SYSTEM, ANSWER), "role-order"),
        (chat(USER, ANSWER, USER), "no-answer"),
        (chat(SYSTEM), "no-answer"),
        (chat(USER, {"role": "assistant", "content": " \n"}), "empty-answer"),
        (chat({"role": "user", "content": ""}, ANSWER), "empty-prompt"),
    ],
)
def test_a_bad_row_is_left_out_and_reported_with_its_line(
    tmp_path: Path, bad: object, code: str
) -> None:
    good = chat(USER, ANSWER)
    file = read_rows(write(tmp_path / "d.jsonl", good, good, bad, good))
    assert [row.line for row in file.rows] == [1, 2, 4]
    assert [(f.code, f.count, f.lines) for f in file.findings] == [(code, 1, [3])]
    assert file.findings[0].severity == PROBLEMS[code][0]
    assert file.total == 4


def test_findings_are_counted_per_reason_and_list_twenty_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}] * 30 + [{"completion": "b"}] * 2 + [SAME_ROW["prompt_completion"]] * 40
    file = read_rows(write(tmp_path / "d.jsonl", *rows))
    completion, prompt = file.findings
    assert (completion.count, completion.lines) == (30, list(range(1, 21)))
    assert "'completion'" in completion.message
    assert (prompt.count, prompt.lines) == (2, [31, 32])
    assert "'prompt'" in prompt.message


def test_a_key_without_meaning_is_reported_and_the_row_is_used(tmp_path: Path) -> None:
    weighted = chat(USER, {**ANSWER, "weight": 0})
    file = read_rows(write(tmp_path / "d.jsonl", {**chat(USER, ANSWER), "tools": [1]}, weighted))
    assert len(file.rows) == 2
    assert [(f.code, f.lines) for f in file.findings] == [
        ("ignored-key", [1]),
        ("ignored-key", [2]),
    ]
    assert "tools" in file.findings[0].message
    assert "weight" in file.findings[1].message


def test_a_row_that_fits_several_shapes_is_read_as_the_one_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**chat(USER, ANSWER), "text": "plain"})
    assert read_rows(path).shape == "messages"
    assert read_rows(path, "text").rows == [Row(1, text="plain")]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_one_json_list_with_line_numbers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('\ufeff[\n  {"text": "a"},\n\n  {"text":\n "b"}, 5\n]\n', encoding="utf-8")
    file = read_rows(path)
    assert file.rows == [Row(2, text="a"), Row(4, text="b")]
    assert [(f.code, f.lines) for f in file.findings] == [("not-an-object", [5])]
    one_line = tmp_path / ("one" + name)
    one_line.write_text('[{"text": "a"}, {"text": "b"}]', encoding="utf-8")
    assert read_rows(one_line).rows == [Row(1, text="a"), Row(1, text="b")]


def test_json_lines_whose_first_row_is_a_list(tmp_path: Path) -> None:
    file = read_rows(write(tmp_path / "d.jsonl", [1], {"text": "a"}))
    assert [row.line for row in file.rows] == [2]
    assert file.findings[0].code == "not-an-object"


def test_line_separators_inside_strings_do_not_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\r\n', encoding="utf-8")
    assert read_rows(path).rows == [Row(1, text="a\u2028b\x85c"), Row(2, text="d")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
        ("d.jsonl", b"\xef\xbb\xbf\n\n\xff", "line 3: byte 0xff"),
        ("d.jsonl", b"", "is empty"),
        ("d.txt", b" \n\n", "is empty"),
        ("d.jsonl", b'{"q": 1, "a": 2}\n', "line 1: keys 'q', 'a' fit no known format"),
        ("d.jsonl", b"a,b\n1,2\n", "line 1 is not a JSON object"),
        ("d.json", b"[]", "no rows"),
        ("d.json", b'[{"text": "a"},\n{"text": }]', "line 2: not valid JSON"),
        ("d.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2: not valid JSON"),
        ("d.json", b'[{"text": "a"}]\n{"text": "b"}', "after the end of the list"),
        ("d.csv", b"a,b\n", ".csv is not read"),
        ("d.txt", b'{"text": "a"}\n{"text": "b"}\n', "rename it to d.jsonl"),
        ("d.jsonl", b'{"prompt": "a", "completion": ""}\n', "no usable row as prompt_completion"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_rows(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_directory_and_unknown_format(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match=r"no such file: did you mean train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UsageError, match="is a directory"):
        read_rows(tmp_path)
    with pytest.raises(UsageError, match="unknown data format 'chat'"):
        read_rows(path, "chat")


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(line, text=text) for line, text in enumerate(texts, start=1)]


@given(
    st.lists(st.sampled_from("abcdefgh"), max_size=30),
    st.floats(0, 0.99),
    st.integers(0, 2**31),
)
def test_split_is_a_partition_with_duplicates_on_one_side(
    texts: list[str], fraction: float, seed: int
) -> None:
    rows = rows_of([text.upper() if i % 2 else f" {text}" for i, text in enumerate(texts)])
    train, validation = split(rows, fraction, seed)
    assert sorted(train + validation, key=lambda row: row.line) == rows
    assert [row.line for row in train] == sorted(row.line for row in train)
    assert {row_key(row) for row in train}.isdisjoint(row_key(row) for row in validation)
    assert split(rows, fraction, seed) == (train, validation)
    if fraction > 0 and len(set(texts)) > 1:
        assert train
        assert validation
    if fraction == 0:
        assert validation == []


def test_split_takes_its_share_and_depends_on_the_seed() -> None:
    rows = rows_of([str(number) for number in range(200)])
    sizes = {len(split(rows, 0.05, seed)[1]) for seed in range(5)}
    assert sizes == {10}
    assert len(split(rows, 0.001, 0)[1]) == 1
    assert len({tuple(row.line for row in split(rows, 0.05, seed)[1]) for seed in range(5)}) == 5


def test_split_never_empties_the_training_side() -> None:
    train, validation = split(rows_of(["a", "b"]), 0.99, 0)
    assert (len(train), len(validation)) == (1, 1)
    train, validation = split(rows_of(["a", "A", "b", "b", "b"]), 0.1, 0)
    assert ([row.text for row in train], len(validation)) == (["b"] * 3, 2)


def test_split_by_a_file_and_bad_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", {"text": "held"})
    rows = rows_of(["a", "b"])
    assert split(rows, path, 0) == (rows, [Row(1, text="held")])
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="from 0 to below 1"):
            split(rows, fraction, 0)
    with pytest.raises(UsageError, match="no such file"):
        split(rows, tmp_path / "none.jsonl", 0)


def test_row_key_ignores_case_and_spacing_but_not_roles() -> None:
    one = Row(1, messages=[{"role": "user", "content": "A  b"}, ANSWER])
    two = Row(9, messages=[{"role": "user", "content": "a\nB "}, ANSWER])
    assert row_key(one) == row_key(two)
    assert row_key(Row(1, messages=[USER])) != row_key(
        Row(1, messages=[{**USER, "role": "system"}])
    )


PROMPT_ROWS = {
    "prompt_completion": {"prompt": "What is 2 + 2?"},
    "alpaca": {"instruction": "What is 2 + 2?"},
    "messages": chat(USER),
    "sharegpt": {"conversations": [{"from": "human", "value": "What is 2 + 2?"}]},
}


@pytest.mark.parametrize("shape", PROMPT_ROWS)
def test_prompts_alone_are_rows_only_when_asked_for(tmp_path: Path, shape: str) -> None:
    path = write(tmp_path / "prompts.jsonl", PROMPT_ROWS[shape])
    found = read_rows(path, answers=False)
    assert (found.shape, found.rows, found.findings) == (shape, [Row(1, messages=[USER])], [])
    with pytest.raises(UsageError):
        read_rows(path)


def test_prompts_and_answered_rows_in_one_file(tmp_path: Path) -> None:
    answered = SAME_ROW["prompt_completion"]
    path = write(tmp_path / "mixed.jsonl", {"prompt": USER["content"]}, answered, {"prompt": " "})
    found = read_rows(path, answers=False)
    assert found.rows == [Row(1, messages=[USER]), Row(2, messages=[USER, ANSWER])]
    assert [(f.code, f.lines) for f in found.findings] == [("empty-prompt", [3])]
    assert [row.line for row in read_rows(path).rows] == [2]
