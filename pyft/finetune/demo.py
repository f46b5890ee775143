"""`pyft demo`: the embedded model becomes a helper that explains Python's standard library, in NF4
with LoRA.

Base model, tokenizer and general text ship with pyft; the questions and answers are built from the
docstrings of the running Python. Held-out rows are of objects no training row is about.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyft import embedded
from pyft.embedded import docstrings
from pyft.errors import UsageError
from pyft.finetune.config import Config, load_config
from pyft.finetune.export import check_output, read_marker
from pyft.finetune.parity import parity
from pyft.finetune.progress import say
from pyft.finetune.report import summary
from pyft.finetune.train import finetune

SETTINGS: dict[str, Any] = {
    "method": "qlora",
    "rank": 16,
    "alpha": 32.0,
    "learning_rate": 4e-3,
    "max_length": 512,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "max_new_tokens": 48,
    "prompts": 4,
    "general_rows": 24,
    "eval_every": 20,
}
STEPS, SHORT_STEPS = 60, 10
TRAIN_ROWS, HELD_OUT_ROWS = 5000, 150


def demo(output: Path, console: Console, short: bool = False, command: str = "") -> dict[str, Any]:
    """Run the demonstration into ``output``, replacing an earlier one; returns the report.

    Raises UsageError, before anything is written, for a directory that holds anything else.
    """
    config, questions = prepare_job(output, short)
    say(console, f"questions and answers from the standard library's docstrings: {config.data}")
    report = finetune(config, console, parity, command)
    console.print(summary(report))
    console.print(_side_by_side(questions, report["answers"]))
    say(console, f"adapter and report: {output} (open {output / 'report.html'})")
    return report


def prepare_job(output: Path, short: bool = False) -> tuple[Config, list[str]]:
    """Write the demonstration's data beside ``output``, in a directory named after it with
    "-docstring-data" added; its configuration and the questions that will be answered.

    An earlier demonstration is overwritten. Raises UsageError, before anything is written, where
    one of the two directories holds anything else.
    """
    output = output.resolve()  # "." has no name
    files = output.parent / f"{output.name}-docstring-data"
    places = {"data": files / "train.jsonl", "validation": files / "held-out.jsonl"}
    steps = SHORT_STEPS if short else STEPS
    job = {"model": embedded.MODEL_DIR, "output": output, "max_steps": steps}
    overwrite = _has_demo(output)
    config = load_config(None, {**SETTINGS, **places, **job, "overwrite": overwrite})
    check_output(config, {})
    _check_data_directory(files, {path.name for path in places.values()})
    train, held_out = docstrings.build_split()
    try:
        files.mkdir(parents=True, exist_ok=True)
        docstrings.write_rows(places["data"], train[:TRAIN_ROWS])
        docstrings.write_rows(places["validation"], held_out[:HELD_OUT_ROWS])
    except OSError as error:
        raise UsageError(f"output: {files}: cannot be written: {error.strerror}") from None
    return config, [row["messages"][0]["content"] for row in held_out[: config.prompts]]


def _has_demo(output: Path) -> bool:
    """Whether an earlier demonstration is in ``output``; UsageError for a run of another model."""
    marker = read_marker(output)
    if marker is not None and marker["job"].get("model") != str(embedded.MODEL_DIR.resolve()):
        raise UsageError(f"output: {output}: holds another run; give a new or empty directory")
    return marker is not None


def _check_data_directory(files: Path, own: set[str]) -> None:
    """UsageError unless ``files`` is absent or a directory with none but the demo's ``own``."""
    if files.exists() and not files.is_dir():
        raise UsageError(f"output: {files}: is a file where the data goes; give another --output")
    other = next((p.name for p in files.glob("*") if p.name not in own), None)
    if other is not None:
        raise UsageError(
            f"output: {files}: the data goes there, but it holds something else (such as {other}); "
            "give another --output"
        )


def _side_by_side(questions: list[str], answers: list[dict[str, str]]) -> Table:
    table = Table(title="Answers to held-out questions", show_lines=True)
    for column in ("question", "base", "fine-tuned", "the docstring says"):
        table.add_column(column, overflow="fold", ratio=1)
    for question, row in zip(questions, answers, strict=True):
        cells = (question, row["before"].strip(), row["after"].strip(), row["expected"])
        table.add_row(*map(Text, cells))
    return table
