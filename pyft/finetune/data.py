"""Training data: files to rows, bad rows to findings, rows to a training and a validation side.

A row is a conversation (`messages`) or a plain text. Five shapes of JSON lines are read:

    messages           {"messages": [{"role": "user", "content": str}, ...]}
    prompt_completion  {"prompt": str or messages, "completion": str or messages}
    alpaca             {"instruction": str, "input": str (optional), "output": str}
    sharegpt           {"conversations": [{"from": "human", "value": str}, ...]}
    text               {"text": str}

The same in one JSON list, and `.txt` files, where every block between blank lines is a text row.
All but text become conversations, so that the model's chat template serves them all. A file holds
one shape: the one of most of its rows. Nothing is dropped without a word: a row that cannot be used
is left out and counted in a `Finding` with its line number. Only a file that cannot be used at all
raises `UsageError`.
"""

import codecs
import difflib
import json
import random
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyft.errors import UsageError

Severity = Literal["error", "warning", "info"]
Message = dict[str, str]

MAX_LINES = 20  # line numbers listed in one finding
# The keys a row of each shape must have; a row is of the first shape it fits.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "observation"}
TEXT_SUFFIXES = {".txt", ".text", ".md"}
FOREIGN_SUFFIXES = {".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zst", ".xz", ".zip"}
# Keys that change what a row means in other tools, and have no meaning here.
IGNORED_KEYS = ("tools", "functions", "history")
IGNORED_MESSAGE_KEYS = ("tool_calls", "function_call", "weight", "reasoning_content", "thinking")

PROBLEMS: dict[str, tuple[Severity, str]] = {
    "invalid-json": ("error", "not valid JSON: write one JSON object per line"),
    "not-an-object": (
        "error",
        'not a JSON object: write {"prompt": ..., "completion": ...} or the like',
    ),
    "empty-row": ("warning", "empty: remove them"),
    "other-shape": ("error", "of another shape than most of the file: keep one shape per file"),
    "missing-key": ("error", "without a needed key: add it"),
    "not-text": ("error", "with something other than text where text is needed: write a string"),
    "invalid-unicode": ("error", "with half a surrogate pair: write the character in UTF-8"),
    "unknown-role": ("error", "with an unknown role: use system, user and assistant"),
    "tool-role": (
        "error",
        "with tool calls, which pyft does not train on: use system, user, assistant",
    ),
    "role-order": (
        "error",
        "in the wrong role order: write system (if any), user, assistant, user, ...",
    ),
    "no-answer": ("error", "with no answer: end them with a message of the assistant"),
    "empty-answer": ("error", "with an empty answer: write the answer or remove the row"),
    "empty-prompt": ("error", "with an empty prompt: write the prompt or use the text shape"),
    "ignored-key": ("warning", "used without a key that has no meaning here: remove the key"),
}


@dataclass(frozen=True)
class Row:
    """One example: `line` is its 1-based line; exactly one of `messages` and `text` is set.

    `messages` are dictionaries of `role` (system, user, assistant) and `content`: at most one
    system message, first, then user and assistant in turns, the assistant last; a row read with
    answers=False may end with the user.
    """

    line: int
    messages: list[Message] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something to say about `count` rows: one line of text and up to 20 line numbers."""

    code: str
    severity: Severity
    count: int
    message: str
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RowFile:
    """The usable rows in file order and what was found; `total` counts the unusable rows too."""

    path: Path
    shape: str
    rows: list[Row]
    findings: list[Finding]
    total: int = 0


class _Bad(Exception):
    """This row cannot be used: a code of PROBLEMS, and which key or role it is about."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


def read_rows(path: str | Path, shape: str = "auto", answers: bool = True) -> RowFile:
    """Read a data file. `shape` is "auto" or a key of `SHAPES`; the shape found is in the result.

    With answers=False a row may be a prompt alone: {"prompt": ...}, {"instruction": ...}, or
    messages that end with the user. Raises UsageError for a missing or unreadable file, a
    directory, bytes that are not UTF-8 (with the line), an unknown shape, a file with no row, and
    one with no usable row (with the reason).
    """
    path = Path(path)
    if shape != "auto" and shape not in SHAPES:
        raise UsageError(f"unknown data format {shape!r}: write auto, {', '.join(SHAPES)}")
    source = _read_text(path)
    if path.suffix.lower() in TEXT_SUFFIXES and shape in ("auto", "text"):
        blocks = _paragraphs(path, source, answers)
        return RowFile(path, "text", blocks, [], len(blocks))
    records = _json_list(path, source) if _is_json_list(path, source) else _json_lines(source)
    if not records:
        raise UsageError(f"{path}: no rows in this file: write one JSON object per line")
    if shape == "auto":
        shape = _detect(path, records, answers)
    rows: list[Row] = []
    problems: dict[tuple[str, str], list[int]] = {}
    for line, record in records:
        try:
            row, ignored = _parse(line, record, shape, answers)
            rows.append(row)
        except _Bad as bad:
            problems.setdefault((bad.code, bad.detail), []).append(line)
        else:
            for key in ignored:
                problems.setdefault(("ignored-key", key), []).append(line)
    findings = [_finding(code, detail, lines) for (code, detail), lines in problems.items()]
    if not rows:
        worst = max(findings, key=lambda finding: finding.count)
        first = f"first at line {worst.lines[0]}"
        raise UsageError(f"{path}: no usable row as {shape}: {worst.message} ({first})")
    return RowFile(path, shape, rows, findings, len(records))


def _finding(code: str, detail: str, lines: list[int]) -> Finding:
    severity, text = PROBLEMS[code]
    rows = f"{len(lines)} row{'s' if len(lines) > 1 else ''}"
    message = f"{rows} {text}{f' ({detail})' if detail else ''}"
    return Finding(code, severity, len(lines), message, lines[:MAX_LINES])


# Files to records


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give a .jsonl, .json or .txt file")
    if path.suffix.lower() in FOREIGN_SUFFIXES:
        raise UsageError(
            f"{path}: {path.suffix} is not read: write one JSON object per line (.jsonl)"
        )
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        files = [other.name for other in path.parent.glob("*") if other.is_file()]
        near = difflib.get_close_matches(path.name, files, 1)
        hint = f": did you mean {near[0]}?" if near else ": give the path of a .jsonl file"
        raise UsageError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise UsageError(
            f"{path}, line {line}: {byte} is not UTF-8: save the file as UTF-8"
        ) from None
    if not text.strip():
        raise UsageError(f"{path} is empty: write at least one row")
    return text


def _paragraphs(path: Path, source: str, answers: bool) -> list[Row]:
    """Blocks between blank lines, one row each; JSON lines in a text file are refused."""
    try:
        first = json.loads(source.strip().split("\n", 1)[0])
    except ValueError:
        first = None
    if isinstance(first, dict) and _shape_of(first, answers):
        raise UsageError(f"{path} holds JSON lines: rename it to {path.stem}.jsonl")
    rows: list[Row] = []
    block: list[str] = []
    start = 1
    for number, line in enumerate([*source.replace("\r\n", "\n").split("\n"), ""], start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            rows.append(Row(start, text="\n".join(block)))
            block = []
    return rows


def _is_json_list(path: Path, source: str) -> bool:
    """Whether the file is one JSON list, not JSON lines of which the first happens to be a list."""
    if not source.lstrip().startswith("["):
        return False
    lines = source.strip().split("\n", 1)
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        return True
    return len(lines) == 1 or path.suffix.lower() == ".json"


def _skip_space(source: str, position: int) -> int:
    while source[position : position + 1].isspace():
        position += 1
    return position


def _json_list(path: Path, source: str) -> list[tuple[int, Any]]:
    """The elements of a JSON array, each with the line it starts on."""
    decoder, records = json.JSONDecoder(), []
    position, line, counted = source.index("[") + 1, 1, 0
    try:
        while True:
            position = _skip_space(source, position)
            if source.startswith("]", position):
                break
            line, counted = line + source.count("\n", counted, position), position
            value, position = decoder.raw_decode(source, position)
            records.append((line, value))
            position = _skip_space(source, position)
            if source.startswith(",", position):
                position += 1
            elif not source.startswith("]", position):
                raise json.JSONDecodeError("',' or ']' expected", source, position)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UsageError(f"{path}, line {line}: JSON nested too deeply") from None
    if source[position + 1 :].strip():
        line = source.count("\n", 0, position) + 1
        raise UsageError(f"{path}, line {line}: text after the end of the list: write one list")
    return records


def _json_lines(source: str) -> list[tuple[int, Any]]:
    """(line, value) up to the last line that is not blank; `_Bad` where there is no value."""
    records: list[tuple[int, Any]] = []
    for number, line in enumerate(source.rstrip().split("\n"), start=1):
        if not line.strip():
            records.append((number, _Bad("empty-row")))
            continue
        try:
            records.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            records.append((number, _Bad("invalid-json")))
    return records


# Records to rows


def _needed(shape: str, answers: bool) -> tuple[str, ...]:
    """The keys a row must have; the first of them holds the prompt."""
    return SHAPES[shape] if answers else SHAPES[shape][:1]


def _shape_of(record: dict[str, Any], answers: bool) -> str | None:
    """The shape whose keys are all there; failing that, for prompts alone, the prompt's."""
    for whole in (True, answers):
        for shape in SHAPES:
            if all(key in record for key in _needed(shape, whole)):
                return shape
    return None


def _detect(path: Path, records: list[tuple[int, Any]], answers: bool) -> str:
    """The shape of most rows; ties go to the shape seen first."""
    objects = [(line, record) for line, record in records if isinstance(record, dict) and record]
    votes = Counter(shape for _, record in objects if (shape := _shape_of(record, answers)))
    if votes:
        return votes.most_common(1)[0][0]
    known = ", or ".join(" and ".join(_needed(shape, answers)) for shape in SHAPES)
    if not objects:
        raise UsageError(
            f"{path}: line {records[0][0]} is not a JSON object, nor is any other: "
            f"write one object per line with the keys {known}"
        )
    line, record = objects[0]
    keys = ", ".join(repr(key) for key in list(record)[:8])
    raise UsageError(f"{path}, line {line}: keys {keys} fit no known format: write {known}")


def _parse(line: int, record: Any, shape: str, answers: bool) -> tuple[Row, list[str]]:
    """The row, and the keys that were present but have no use here. Raises _Bad."""
    if isinstance(record, _Bad):
        raise record
    if not isinstance(record, dict):
        raise _Bad("not-an-object")
    if all(value is None or value == "" or value == [] for value in record.values()):
        raise _Bad("empty-row")
    missing = [key for key in _needed(shape, answers) if key not in record]
    if missing:
        if other := _shape_of(record, answers):
            raise _Bad("other-shape", f"{other}, not {shape}")
        raise _Bad("missing-key", f"no {missing[0]!r}")
    if shape == "text":
        text = _text(record["text"], "text")
        if not text.strip():
            raise _Bad("empty-row")
        return Row(line, text=text), []
    ignored = [key for key in IGNORED_KEYS if record.get(key)]
    messages: list[Message] = []
    if isinstance(record.get("system"), str) and record["system"].strip():
        messages.append({"role": "system", "content": _text(record["system"], "system")})
    if shape == "alpaca":
        parts = (_text(record.get(key) or "", key) for key in ("instruction", "input"))
        prompt = "\n\n".join(part for part in parts if part.strip())
        messages.append({"role": "user", "content": prompt})
        if answers or record.get("output") is not None:
            messages.append({"role": "assistant", "content": _text(record["output"], "output")})
    elif shape == "prompt_completion":
        messages += _turns(record["prompt"], "prompt", "user", ignored)
        if answers or record.get("completion") is not None:
            messages += _turns(record["completion"], "completion", "assistant", ignored)
    else:
        messages += _turns(record[SHAPES[shape][0]], SHAPES[shape][0], None, ignored)
    _check_order(messages, answers)
    return Row(line, messages=messages), ignored


def _text(value: Any, key: str) -> str:
    """A string, or the joined text of a list of {"type": "text", "text": ...}. Raises _Bad."""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in value]
        parts = [text for text in texts if isinstance(text, str)]
        value = "".join(parts) if len(parts) == len(value) else value
    if not isinstance(value, str):
        raise _Bad("not-text", f"{key!r} is {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Bad("invalid-unicode", f"in {key!r}") from None
    return value


def _turns(value: Any, key: str, text_role: str | None, ignored: list[str]) -> list[Message]:
    """A list of messages; with `text_role` also a string, which is one message of that role."""
    if text_role and isinstance(value, str):
        return [{"role": text_role, "content": _text(value, key)}]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _Bad("not-text", f"{key!r} is not a list of messages")
    messages = []
    for item in value:
        named = item.get("role", item.get("from"))
        role = str(named).lower()
        if role in TOOL_ROLES or item.get("tool_calls"):
            raise _Bad("tool-role", role)
        if role not in ROLES:
            raise _Bad("unknown-role", "no role" if named is None else repr(named))
        content = item.get("content", item.get("value"))
        messages.append({"role": ROLES[role], "content": _text(content, "content")})
        used = (name for name in IGNORED_MESSAGE_KEYS if item.get(name) is not None)
        ignored += [name for name in used if name not in ignored]
    return messages


def _check_order(messages: list[Message], answers: bool) -> None:
    """[system], user, assistant, ..., none of them empty; with `answers` the assistant is last.

    Raises _Bad.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for previous, message in zip([None, *turns], turns, strict=False):
        if message["role"] == "system":
            raise _Bad("role-order", "system is not first")
        if previous is None and message["role"] == "assistant":
            raise _Bad("role-order", "assistant first")
        if previous is not None and previous["role"] == message["role"]:
            raise _Bad("role-order", f"two {message['role']} messages in a row")
    if not turns or (answers and turns[-1]["role"] != "assistant"):
        raise _Bad("no-answer")
    for message in turns:
        if not message["content"].strip():
            raise _Bad("empty-answer" if message["role"] == "assistant" else "empty-prompt")


# Training and validation


def normalise(text: str) -> str:
    """Text as duplicates are compared: NFKC, without case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def row_key(row: Row) -> str:
    """Equal for rows that are duplicates after `normalise`; roles count."""
    if row.messages is None:
        return normalise(row.text or "")
    return "\0".join(f"{turn['role']}:{normalise(turn['content'])}" for turn in row.messages)


def split(rows: list[Row], validation: float | Path, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation), each in file order; the same for the same rows, fraction and seed.

    A fraction in [0, 1) takes that share of the rows, at least one (0 takes none); duplicates stay
    on one side, so a file of one row many times has no validation side. A path reads that file;
    call `read_rows` yourself to see its findings too. Raises UsageError for a fraction outside
    [0, 1) and for whatever `read_rows` refuses.
    """
    if isinstance(validation, str | Path):
        return list(rows), read_rows(validation).rows
    if not 0 <= validation < 1:
        raise UsageError(
            f"validation is {validation}: write a fraction from 0 to below 1, or a file's path"
        )
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row_key(row), []).append(index)
    if validation == 0 or len(groups) < 2:
        return list(rows), []
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    wanted = min(max(1, round(len(rows) * validation)), len(rows) - 1)
    held: set[int] = set()
    for group in shuffled:
        if len(group) <= wanted - len(held):
            held.update(group)
    if not held:  # every group of duplicates is larger than the share
        shuffled.sort(key=lambda group: len(group))
        held.update(shuffled[0])
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [row for index, row in enumerate(rows) if index in held]
