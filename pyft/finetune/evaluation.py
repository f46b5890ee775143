"""`pyft eval`: a base model, with or without an adapter, on held-out rows or prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from pyft.errors import UsageError
from pyft.finetune.batches import Packed
from pyft.finetune.charts import short
from pyft.finetune.config import load_config
from pyft.finetune.data import read_rows
from pyft.finetune.evaluate import evaluate
from pyft.finetune.export import check_adapter_matches
from pyft.finetune.model import DTYPES, compute_dtype, load_base, load_tokenizer
from pyft.finetune.progress import quiet
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

    Returns {"model", "adapter", "data", "rows", "loss": {mean, low, high, tokens}, "perplexity",
    "answers": [{"prompt", "expected", "answer"}]}. Raises UsageError for wrong input, an adapter
    made for another base included.
    """
    if settings.quant not in (*FORMATS, "none"):
        raise UsageError(f"quant: {settings.quant!r} is not one of {', '.join(FORMATS)}, none")
    if settings.dtype not in (*DTYPES, "auto"):
        raise UsageError(f"dtype: {settings.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    rowfile = read_rows(settings.data)
    if settings.adapter is not None:
        check_adapter_matches(settings.model, settings.adapter)
    with quiet():
        tokenizer = load_tokenizer(settings.adapter or settings.model, weights=settings.model)
        template, _ = resolve(tokenizer, settings.chat_template)
        encoded = trainable(
            encode_rows(rowfile.rows, tokenizer, template, settings.max_length, "answer")
        )
        if not encoded:
            raise UsageError(f"{settings.data}: no row has an answer to measure the loss on")
        model = load(settings)
        places = {"model": settings.model, "data": settings.data, "output": Path(".")}
        job = load_config(None, {**places, "max_length": settings.max_length})
        asked = rowfile.rows[: settings.answers]
        prompts = [prompt_text(row, tokenizer, template) for row in asked]
        batches = Packed(encoded, job, tokenizer).batches(1)
        found = evaluate(model, tokenizer, batches, prompts, settings.max_new_tokens, template)
    rows = zip(prompts, map(answer_text, asked), found["answers"], strict=True)
    return {
        "model": str(settings.model),
        "adapter": str(settings.adapter) if settings.adapter else None,
        "data": str(settings.data),
        "rows": len(encoded),
        **found,
        "answers": [dict(zip(("prompt", "expected", "answer"), row, strict=True)) for row in rows],
    }


def load(settings: Settings) -> Any:
    """The base with the adapter on it, its linears fused, in eval mode."""
    quantize = PyftConfig(settings.quant) if settings.quant != "none" else None
    model = load_base(settings.model, quantize, compute_dtype(settings.dtype))
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(settings.adapter))
    apply(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def show(result: dict[str, Any]) -> Group:
    """The result for a terminal."""
    loss = result["loss"]
    interval = f"95 % interval {short(loss['low'])} to {short(loss['high'])}"
    head = (
        f"{result['rows']} rows, {loss['tokens']} answer tokens: loss {short(loss['mean'])} "
        f"nats per token ({interval}), perplexity {short(result['perplexity'])}"
    )
    table = Table("prompt", "answer", "expected", show_lines=True)
    for row in result["answers"]:
        table.add_row(row["prompt"].strip(), row["answer"].strip(), row["expected"])
    return Group(head, table) if result["answers"] else Group(head)
