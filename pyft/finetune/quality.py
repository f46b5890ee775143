"""What is wrong with the data, said before training on it.

Near duplicates: the words of a row (without system messages) give the set of its runs of three
words; two rows are near when the Jaccard similarity |a & b| / |a | b| of their sets is at least
0.8. Candidates come from MinHash signatures in a locality-sensitive index (A. Broder 1997; the
datasketch package), and each is verified by its true Jaccard similarity before it is reported.
Runs of words found in more than half of the rows, such as a fixed instruction around every
question, are left out of the sets: they say nothing about two rows. The same index, filled with
the training rows, finds validation rows that leak.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyft.finetune.data import (
    MAX_LINES,
    Finding,
    Row,
    RowFile,
    Severity,
    normalise,
    read_rows,
    row_key,
    split,
)
from pyft.finetune.template import NOTES, Encoded, control_tokens, encode_rows, resolve

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase as Tokenizer

NEAR = 0.8  # Jaccard similarity from which two rows count as near duplicates
PERMUTATIONS = 128
BANDS = (18, 7)  # bands and rows of the index: finds 98 % of pairs at 0.8, 99.98 % at 0.9
ESTIMATE_ERROR = 0.15  # four standard deviations of a similarity read off two signatures
SEED = 1
SHINGLE = 3  # words in a run
BOILERPLATE_ROWS = 20  # from this many rows on, runs in more than half of them are left out
VERIFIED = 32  # candidates verified for one row, the most similar signatures first
LONG_ANSWER = 12  # words from which one answer on both sides is a leak, not a common label
SHORT_ANSWER = 2  # supervised tokens, the end of turn included
UNKNOWN_SHARE = 0.001
BINS = 12

# Words; a sign is a word, and so is each character of a script written without spaces.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")

Shingles = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """The findings, worst first, and the lengths in tokens (in words where there is no model).

    `lengths`: unit, rows, p50, p90, p99, max and histogram, a list of [low, high, rows] with
    low <= length < high.
    """

    findings: list[Finding]
    lengths: dict[str, Any]

    def fatal(self) -> list[Finding]:
        """The findings that --strict stops at: errors and warnings."""
        return [finding for finding in self.findings if finding.severity != "info"]

    def to_dict(self) -> dict[str, Any]:
        """{"findings": [...], "lengths": {...}}, JSON serialisable."""
        return {"findings": [asdict(f) for f in self.findings], "lengths": self.lengths}

    def table(self) -> "Table":
        """A rich table of the findings and one line on the lengths."""
        from rich.table import Table
        from rich.text import Text

        colours = {"error": "red", "warning": "yellow", "info": "dim"}
        table = Table("severity", "code", "what, and what to do", "lines", title="Data quality")
        for finding in self.findings:
            shown = ", ".join(map(str, finding.lines[:5]))
            more = ", ..." if len(finding.lines) > 5 else ""
            colour = colours[finding.severity]
            what = Text(finding.message)
            table.add_row(Text(finding.severity, colour), finding.code, what, shown + more)
        if not self.findings:
            table.add_row("", "", "nothing found", "")
        if self.lengths.get("rows"):
            values = (f"{name} {self.lengths[name]}" for name in ("p50", "p90", "p99", "max"))
            table.caption = f"{self.lengths['unit']} a row: {', '.join(values)}"
        return table


def check(
    rowfile: RowFile,
    validation_rows: Sequence[Row],
    encoded: Sequence[Encoded],
    tokenizer: "Tokenizer | None" = None,
    validation_file: RowFile | None = None,
) -> Quality:
    """Everything there is to say about a file before training on it.

    `validation_rows` are those that `split` set aside, of this file or of `validation_file`, whose
    own findings are then included. `encoded` are the sequences of `encode_rows`, before `trainable`
    drops those with nothing supervised. Deterministic.
    """
    held = {id(row) for row in validation_rows}
    train = [row for row in rowfile.rows if id(row) not in held]
    findings = list(rowfile.findings)
    if validation_file is not None:
        name = validation_file.path.name
        findings += [
            Finding(f.code, f.severity, f.count, f"validation file {name}: {f.message}", f.lines)
            for f in validation_file.findings
        ]
    findings += _similarity(rowfile.rows, train, validation_rows)
    findings += encoding_findings(encoded)
    if tokenizer is not None:
        findings += _tokenizer(tokenizer, rowfile.rows, encoded)
    order = {"error": 0, "warning": 1, "info": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    if tokenizer is None and not encoded:
        return Quality(findings, _lengths([len(_words(row)) for row in rowfile.rows], "words"))
    return Quality(findings, _lengths([_full(item) for item in encoded], "tokens"))


def check_file(
    path: str | Path,
    model: "str | Path | Tokenizer | None" = None,
    shape: str = "auto",
    max_length: int = 1024,
    validation: float | Path = 0.05,
    seed: int = 0,
    chat_template: str | Path | None = None,
) -> Quality:
    """`check` of a file as `pyft finetune` would read and split it.

    `model` is a model's directory, or its tokenizer; without one, tokens are not looked at. Raises
    UsageError as `read_rows`, `split`, `load_tokenizer`, `resolve` and `encode_rows` do.
    """
    if isinstance(model, str | Path):
        from pyft.finetune.model import load_tokenizer

        tokenizer = load_tokenizer(Path(model))
    else:
        tokenizer = model
    rowfile = read_rows(path, shape)
    validation_file = read_rows(validation) if isinstance(validation, str | Path) else None
    if validation_file is not None:
        held = validation_file.rows
    else:
        held = split(rowfile.rows, validation, seed)[1]
    encoded: list[Encoded] = []
    if tokenizer is not None:
        template = resolve(tokenizer, chat_template)[0]
        encoded = encode_rows(rowfile.rows, tokenizer, template, max_length)
    return check(rowfile, held, encoded, tokenizer, validation_file)


def _found(code: str, severity: Severity, lines: Iterable[int], text: str) -> list[Finding]:
    """One finding on rows with these lines, or none; "{rows}" in `text` is their number."""
    listed = list(lines)
    if not listed:
        return []
    rows = f"{len(listed)} row{'s' if len(listed) > 1 else ''}"
    message = text.replace("{rows}", rows)
    return [Finding(code, severity, len(listed), message, sorted(set(listed))[:MAX_LINES])]


# Duplicates and leaks


def _similarity(
    rows: Sequence[Row], train: Sequence[Row], validation: Sequence[Row]
) -> list[Finding]:
    findings, unique = _exact(rows, train, validation)
    if find_spec("datasketch") is None:
        text = "near duplicates and near leaks were not looked for: pip install 'pyft[finetune]'"
        return [*findings, Finding("near-not-checked", "info", 0, text)]
    trained = {row_key(row) for row in train}
    fresh = [row for row in validation if row_key(row) not in trained]
    findings += _pairs(
        "near-duplicate",
        near_pairs([_words(row) for row in unique]),
        unique,
        unique,
        "{rows} nearly repeat an earlier row{example}: keep one of each, or make them differ",
    )
    if not fresh:
        return findings
    close = near_pairs([_words(row) for row in train], [_words(row) for row in fresh])
    advice = "remove them from one side, or the validation loss is too good"
    findings += _pairs(
        "leak-near",
        close,
        fresh,
        train,
        "{rows} of the validation side nearly repeat a training row{example}: " + advice,
    )
    known = {index for index, _ in close}
    asked = [row for i, row in enumerate(fresh) if i not in known and _long_answer(row)]
    answered = [row for row in train if _long_answer(row)]
    return findings + _pairs(
        "leak-answer",
        near_pairs([_answer_words(row) for row in answered], [_answer_words(row) for row in asked]),
        asked,
        answered,
        "{rows} of the validation side have nearly an answer that is trained on{example}: "
        + advice,
    )


def _exact(
    rows: Sequence[Row], train: Sequence[Row], validation: Sequence[Row]
) -> tuple[list[Finding], list[Row]]:
    """Findings on equal rows and equal prompts, and the rows without their repeats."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row_key(row), row)
    unique = list(first.values())
    kept = {id(row) for row in unique}
    repeats = [row.line for row in rows if id(row) not in kept]
    findings = _found(
        "exact-duplicate", "warning", repeats, "{rows} repeat an earlier row: remove the repeats"
    )
    trained = {row_key(row) for row in train}
    findings += _found(
        "leak-exact",
        "error",
        [row.line for row in validation if row_key(row) in trained],
        "{rows} of the validation side are also trained on: remove them from one side",
    )
    prompts = {key for row in train if (key := _prompt_key(row))}
    fresh = [row for row in validation if row_key(row) not in trained]
    findings += _found(
        "leak-prompt",
        "info",
        [row.line for row in fresh if _prompt_key(row) in prompts],
        "{rows} of the validation side have a prompt that is trained on with another answer: "
        "put all answers to one prompt on one side, unless that is meant",
    )
    return findings, unique


def _pairs(
    code: str,
    pairs: list[tuple[int, int]],
    rows: Sequence[Row],
    others: Sequence[Row],
    text: str,
) -> list[Finding]:
    """A warning on rows[i] for each pair (i, j), with the first pair's lines as the example."""
    if not pairs:
        return []
    index, other = pairs[0]
    example = f" (line {rows[index].line} and line {others[other].line})"
    lines = [rows[index].line for index, _ in pairs]
    return _found(code, "warning", lines, text.replace("{example}", example))


def near_pairs(
    reference: Sequence[list[str]], queries: Sequence[list[str]] | None = None
) -> list[tuple[int, int]]:
    """(i, j): query i is near reference j, one j for each i that has any; texts are lists of words.

    Without queries, the reference against itself: i is near an earlier j that is near none before
    it. Every pair returned has a Jaccard similarity of at least NEAR; a pair of just that
    similarity is missed by the index in 1 to 2 % of cases, a closer one far more rarely.
    """
    from datasketch import MinHash, MinHashLSH

    texts = [*reference, *(queries or [])]
    sets = _shingle_sets(texts, len(reference))
    blank = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    signatures = np.zeros((len(texts), PERMUTATIONS), dtype=np.uint64)
    pairs = []
    for i, runs in enumerate(sets):
        if not len(runs):
            continue
        sketch = blank.copy()
        sketch.update_batch(_mix(runs).tolist())
        signatures[i] = sketch.hashvalues
        if queries is None or i >= len(reference):
            candidates = np.array(sorted(index.query(sketch)), dtype=np.int64)
            similar = (signatures[candidates] == signatures[i]).mean(axis=1)
            order = np.argsort(-similar, kind="stable")[:VERIFIED]
            likely = candidates[order[similar[order] >= NEAR - ESTIMATE_ERROR]]
            match = next((int(j) for j in likely if _jaccard(runs, sets[j]) >= NEAR), None)
            if match is not None:
                pairs.append((i if queries is None else i - len(reference), match))
                continue
        if i < len(reference):
            index.insert(i, sketch)
    return pairs


def _shingle_sets(texts: Sequence[list[str]], reference: int) -> list[Shingles]:
    """The set of runs of SHINGLE words of each text, sorted; exact up to 2 million distinct words.

    A run is the three words' numbers in one integer, 21 bits each.
    """
    numbers: dict[str, int] = {}
    sets = []
    for words in texts:
        ids = np.array([numbers.setdefault(w, len(numbers)) for w in words], dtype=np.int64)
        ids &= (1 << 21) - 1
        sets.append(np.unique((ids[:-2] << 42) | (ids[1:-1] << 21) | ids[2:]))
    if reference >= BOILERPLATE_ROWS:
        runs, counts = np.unique(np.concatenate(sets[:reference]), return_counts=True)
        common = runs[counts > reference / 2]
        if len(common):
            sets = [np.setdiff1d(runs, common, assume_unique=True) for runs in sets]
    return sets


def _mix(runs: Shingles) -> npt.NDArray[np.uint64]:
    """32-bit hashes (multiply-shift), as MinHash takes them."""
    return (runs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def _jaccard(one: Shingles, two: Shingles) -> float:
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared)


def _words(row: Row) -> list[str]:
    if row.messages is None:
        return WORD.findall(normalise(row.text or ""))
    turns = (turn["content"] for turn in row.messages if turn["role"] != "system")
    return WORD.findall(normalise("\n".join(turns)))


def _answer_words(row: Row) -> list[str]:
    return WORD.findall(normalise(row.messages[-1]["content"])) if row.messages else []


def _long_answer(row: Row) -> bool:
    return len(_answer_words(row)) >= LONG_ANSWER


def _prompt_key(row: Row) -> str | None:
    return row_key(Row(row.line, messages=row.messages[:-1])) if row.messages else None


# Tokens


def _full(item: Encoded) -> int:
    return len(item.input_ids) + item.truncated


def encoding_findings(encoded: Sequence[Encoded]) -> list[Finding]:
    """What encoding did to the rows: tokens cut, answers lost, notes of the chat template."""
    cut = [item for item in encoded if item.truncated]
    lost = sum(item.supervised_lost for item in cut)
    supervised = lost + sum(item.supervised for item in encoded)
    findings = _found(
        "truncated",
        "warning",
        [item.line for item in cut],
        f"{{rows}} cut at max_length, losing {lost} of {supervised} supervised tokens: "
        f"raise max_length (the longest row has {max(map(_full, encoded), default=0)} tokens)",
    )
    findings += _found(
        "nothing-supervised",
        "error",
        [item.line for item in encoded if not item.supervised],
        "{rows} have no supervised token within max_length and are left out: raise max_length",
    )
    for code, (severity, text) in NOTES.items():
        noted = [item.line for item in encoded if code in item.notes]
        findings += _found(code, severity, noted, "{rows} " + text)
    return findings + _found(
        "short-answer",
        "info",
        [item.line for item in encoded if 0 < item.supervised <= SHORT_ANSWER],
        f"{{rows}} have at most {SHORT_ANSWER} supervised tokens: right for labels, else check",
    )


def _tokenizer(
    tokenizer: "Tokenizer", rows: Sequence[Row], encoded: Sequence[Encoded]
) -> list[Finding]:
    findings = []
    eos, pad, unknown = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    if eos is None:
        text = "the tokenizer has no eos token, so texts do not end: set eos_token in its config"
        findings.append(Finding("no-eos", "warning", 0, text))
    elif pad == eos:
        text = (
            "pad is the eos token: nothing to do here (padding is told by position, so eos stays "
            "supervised), but a trainer that masks by id makes models that never stop"
        )
        findings.append(Finding("pad-is-eos", "info", 0, text))
    if unknown is not None and unknown not in (eos, pad, tokenizer.bos_token_id):
        hits = [item for item in encoded if unknown in item.input_ids]
        count = sum(item.input_ids.count(unknown) for item in hits)
        share = count / max(1, sum(len(item.input_ids) for item in encoded))
        findings += _found(
            "unknown-tokens",
            "warning" if share > UNKNOWN_SHARE else "info",
            [item.line for item in hits],
            f"{{rows}} hold text the tokenizer does not know ({share:.2%} of all tokens): "
            "remove those characters or use another model",
        )
    names = control_tokens(tokenizer)
    if names:
        control = re.compile("|".join(map(re.escape, names)))
        chats = [
            row.line
            for row in rows
            if row.messages and any(control.search(turn["content"]) for turn in row.messages)
        ]
        findings += _found(
            "control-token",
            "warning",
            chats,
            "{rows} hold control tokens of the model as text, which it reads as "
            "the control: remove them",
        )
        texts = [row.line for row in rows if row.text and control.search(row.text)]
        findings += _found(
            "control-token",
            "info",
            texts,
            "{rows} hold control tokens of the model, read as such: right if rendered on purpose",
        )
    return findings


def _lengths(lengths: Sequence[int], unit: str) -> dict[str, Any]:
    summary: dict[str, Any] = {"unit": unit, "rows": len(lengths), "histogram": []}
    if not lengths:
        return {**summary, "p50": 0, "p90": 0, "p99": 0, "max": 0}
    values = np.array(lengths)
    for percent in (50, 90, 99):
        summary[f"p{percent}"] = int(np.percentile(values, percent, method="inverted_cdf"))
    summary["max"] = int(values.max())
    width = summary["max"] // BINS + 1
    counts = np.bincount(values // width)
    summary["histogram"] = [
        [index * width, (index + 1) * width, int(count)] for index, count in enumerate(counts)
    ]
    return summary
