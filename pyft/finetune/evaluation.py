"""`pyft eval`: a base model, with or without an adapter, on held-out rows or prompts."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pyft.errors import UsageError
from pyft.finetune.batches import Packed
from pyft.finetune.charts import short
from pyft.finetune.config import Config, load_config
from pyft.finetune.data import Row, read_rows
from pyft.finetune.evaluate import evaluate
from pyft.finetune.export import check_adapter_matches
from pyft.finetune.model import DTYPES, compute_dtype, load_base, load_tokenizer
from pyft.finetune.packing import isolates
from pyft.finetune.progress import quiet
from pyft.finetune.quality import encoding_findings
from pyft.finetune.template import answer_text, encode_rows, prompt_text, resolve, trainable
from pyft.formats import FORMATS
from pyft.integrations.peft import apply
from pyft.integrations.transformers import PyftConfig


@dataclass(frozen=True)
class Settings:
    """What to evaluate; the fields are the options of `pyft eval`."""

    model: Path
    data: Path
    adapter: Path | None = None
    quant: str = "none"
    dtype: str = "auto"
    max_length: int = 1024
    answers: int = 4
    max_new_tokens: int = 64
    chat_template: Path | None = None


def evaluate_files(settings: Settings) -> dict[str, Any]:
    """Loss with its 95 % interval, perplexity and some answers.

    The loss is taken on the rows that have an answer; of a file of prompts alone it and the
    perplexity are None, and so is "expected" of a prompt without an answer.

    Returns {"model", "adapter", "data", "rows": sequences measured, "prompts": rows without an
    answer, "findings": [{"code", "severity", "count", "message", "lines"}], "truncated": {"rows",
    "supervised_lost"}, "loss": {mean, low, high, tokens}, "perplexity", "answers": [{"prompt",
    "expected", "answer"}]}. Raises UsageError for wrong input, an adapter made for another base
    included, before the weights are loaded.
    """
    job = _job(settings)
    rowfile = read_rows(settings.data, answers=False)
    answered = [row for row in rowfile.rows if _has_answer(row)]
    if not answered and not settings.answers:
        raise UsageError(f"{settings.data}: no row has an answer, so --answers must be above 0")
    if settings.adapter is not None:
        check_adapter_matches(settings.model, settings.adapter)
    with quiet():
        tokenizer = load_tokenizer(settings.adapter or settings.model, weights=settings.model)
        template, _ = resolve(tokenizer, settings.chat_template)
        encoded = encode_rows(answered, tokenizer, template, settings.max_length, "answer")
        measured = trainable(encoded)
        if answered and not measured:
            raise UsageError(
                f"{settings.data}: no row has an answer within {settings.max_length} tokens to "
                "measure the loss on: raise --max-length"
            )
        asked = rowfile.rows[: settings.answers]
        prompts = [prompt_text(_with_answer(row), tokenizer, template) for row in asked]
        model = load(settings)
        job = job.model_copy(update={"pack": isolates(model)})
        batches = Packed(measured, job, tokenizer).batches(1) if measured else None
        found = evaluate(model, tokenizer, batches, prompts, settings.max_new_tokens, template)
    expected = [answer_text(row) if _has_answer(row) else None for row in asked]
    rows = zip(prompts, expected, found["answers"], strict=True)
    cut = [item for item in encoded if item.truncated]
    return {
        "model": str(settings.model),
        "adapter": str(settings.adapter) if settings.adapter else None,
        "data": str(settings.data),
        "rows": len(measured),
        "prompts": len(rowfile.rows) - len(answered),
        "findings": [asdict(f) for f in (*rowfile.findings, *encoding_findings(encoded))],
        "truncated": {
            "rows": len(cut),
            "supervised_lost": sum(item.supervised_lost for item in cut),
        },
        **found,
        "answers": [dict(zip(("prompt", "expected", "answer"), row, strict=True)) for row in rows],
    }


def _job(settings: Settings) -> Config:
    """The options checked, as a configuration; UsageError for a wrong one."""
    if settings.quant not in (*FORMATS, "none"):
        raise UsageError(f"quant: {settings.quant!r} is not one of {', '.join(FORMATS)}, none")
    if settings.dtype not in (*DTYPES, "auto"):
        raise UsageError(f"dtype: {settings.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if settings.dtype == "fp16" and not torch.cuda.is_available():
        raise UsageError("dtype: fp16 needs a GPU; write bf16, fp32 or auto")
    if settings.answers < 0:
        raise UsageError(f"--answers: {settings.answers} is not a whole number from 0 up")
    places = {"model": settings.model, "data": settings.data, "output": Path(".")}
    limits = {"max_length": settings.max_length, "max_new_tokens": settings.max_new_tokens}
    return load_config(None, {**places, **limits})


def _has_answer(row: Row) -> bool:
    return row.messages is None or row.messages[-1]["role"] == "assistant"


def _with_answer(row: Row) -> Row:
    """The row with some answer where it has none: `prompt_text` takes the last one off again."""
    if row.messages is None or _has_answer(row):
        return row
    return Row(row.line, messages=[*row.messages, {"role": "assistant", "content": "-"}])


def load(settings: Settings) -> Any:
    """The base with the adapter on it, its linears fused, in eval mode."""
    quantize = PyftConfig(settings.quant) if settings.quant != "none" else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(settings.model, quantize, compute_dtype(settings.dtype), device)
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(settings.adapter))
    apply(model)
    return model.to(device).eval()


def show(result: dict[str, Any]) -> Group:
    """The result for a terminal."""
    table = Table("prompt", "answer", "expected", show_lines=True)
    for row in result["answers"]:
        cells = (row["prompt"].strip(), row["answer"].strip(), row["expected"] or "")
        table.add_row(*map(Text, cells))
    return Group(*map(Text, _lines(result)), *([table] if result["answers"] else []))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    loss = result["loss"]
    if loss is not None:
        interval = f"95 % interval {short(loss['low'])} to {short(loss['high'])}"
        yield (
            f"{result['rows']} rows, {loss['tokens']} answer tokens: loss {short(loss['mean'])} "
            f"nats per token ({interval}), perplexity {short(result['perplexity'])}"
        )
    if result["prompts"]:
        rows = f"{result['prompts']} row{'s' if result['prompts'] > 1 else ''}"
        yield f"{rows} without an answer: no loss on them"
    shown = len(result["answers"])
    if loss is None and shown < result["prompts"]:
        yield f"the first {shown} are answered; --answers {result['prompts']} answers all"
    for finding in result["findings"]:
        yield f"{finding['severity']}: {finding['message']}"
