"""`pyft demo`: the embedded model becomes a helper that explains Python's standard library, in NF4
with LoRA.

Base model, tokenizer and general text ship with pyft; the questions and answers are built from the
docstrings of the running Python. Held-out rows are of objects no training row is about.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyft import embedded
from pyft.embedded import docstrings
from pyft.finetune.config import Config, load_config
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
    "general_rows": 32,
}
STEPS, SHORT_STEPS = 75, 10
TRAIN_ROWS, HELD_OUT_ROWS = 5000, 200


def demo(output: Path, console: Console, short: bool = False, command: str = "") -> dict[str, Any]:
    """Run the demonstration into ``output``, replacing an earlier one; returns the report."""
    config, questions = prepare_job(output, short)
    say(console, f"questions and answers from the standard library's docstrings: {config.data}")
    report = finetune(config, console, parity, command)
    console.print(summary(report))
    console.print(_side_by_side(questions, report["answers"]))
    say(console, f"adapter and report: {output} (open {output / 'report.html'})")
    return report


def prepare_job(output: Path, short: bool = False) -> tuple[Config, list[str]]:
    """Write the demonstration's data beside ``output``; its configuration and the questions that
    will be answered.
    """
    files = output.with_name(f"{output.name}-data")
    files.mkdir(parents=True, exist_ok=True)
    places = {"data": files / "train.jsonl", "validation": files / "held-out.jsonl"}
    train, held_out = docstrings.build_split()
    docstrings.write_rows(places["data"], train[:TRAIN_ROWS])
    docstrings.write_rows(places["validation"], held_out[:HELD_OUT_ROWS])
    steps = SHORT_STEPS if short else STEPS
    job = {"model": embedded.MODEL_DIR, "output": output, "max_steps": steps, "overwrite": True}
    config = load_config(None, {**SETTINGS, **places, **job})
    return config, [row["messages"][0]["content"] for row in held_out[: config.prompts]]


def _side_by_side(questions: list[str], answers: list[dict[str, str]]) -> Table:
    table = Table(title="Answers to held-out questions", show_lines=True)
    for column in ("question", "base", "fine-tuned", "the docstring says"):
        table.add_column(column, overflow="fold", ratio=1)
    for question, row in zip(questions, answers, strict=True):
        table.add_row(question, row["before"].strip(), row["after"].strip(), row["expected"])
    return table
