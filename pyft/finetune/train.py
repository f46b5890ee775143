"""The fine-tuning job: read, check, load, measure, train, measure, report, export.

`finetune` is the whole job from a configuration. `run` is its heavy middle and takes a loaded model
and encoded rows, so that another program, or a test, can bring its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

import pyft
from pyft.errors import PyftError, UsageError
from pyft.finetune import checkpoint, describe, export
from pyft.finetune.batches import Packed, replay_rows
from pyft.finetune.config import Config
from pyft.finetune.evaluate import Estimate, evaluate_loss
from pyft.finetune.forgetting import GeneralText, Point, measure, remember_base
from pyft.finetune.loop import (
    Loop,
    checkpoint_activations,
    precision,
    run_device,
    train_in_fp32,
)
from pyft.finetune.monitor import Monitor
from pyft.finetune.packing import isolates
from pyft.finetune.progress import TrainingProgress, quiet, say
from pyft.finetune.template import Encoded, trainable

ISOLATED = "isolated"
Parity = Callable[[Any, dict[str, Tensor]], list[dict[str, Any]]]


def finetune(
    config: Config, console: Console, parity: Parity | None = None, command: str = ""
) -> dict[str, Any]:
    """Do the whole job of `config`, print its progress to `console`, and return the report.

    Everything that can be refused is refused before the weights are loaded. Raises UsageError for
    wrong input and PyftError for a run that fails, each with a one-line message.
    """
    from pyft.finetune.data import read_rows, split
    from pyft.finetune.evaluate import answers
    from pyft.finetune.model import load_model, load_tokenizer
    from pyft.finetune.quality import check
    from pyft.finetune.report import write_report
    from pyft.finetune.template import answer_text, encode_rows, prompt_text, resolve

    if config.dtype == "fp16" and not torch.cuda.is_available():
        raise UsageError("dtype: fp16 needs a GPU; write bf16, fp32 or auto")
    rowfile = read_rows(config.data, config.format)
    validation_file = None
    if isinstance(config.validation, Path):
        validation_file = read_rows(config.validation)
    job = checkpoint.job(config)
    standing = export.check_output(config, job)
    if standing == "finished":
        say(console, f"{config.output}: this run is finished already; its report is there")
        return dict(json.loads((config.output / "report.json").read_text(encoding="utf-8")))
    if validation_file is not None:
        train_rows, valid_rows = rowfile.rows, validation_file.rows
    else:
        train_rows, valid_rows = split(rowfile.rows, config.validation, config.seed)
    with quiet():
        tokenizer = load_tokenizer(config.model)
        template, origin = resolve(tokenizer, config.chat_template)
        encoded, held_out = (
            encode_rows(rows, tokenizer, template, config.max_length, config.train_on)
            for rows in (train_rows, valid_rows)
        )
    say(console, f"data: {config.data}: {len(rowfile.rows)} rows of shape {rowfile.shape}")
    say(console, f"data: {len(train_rows)} to train on, {len(valid_rows)} held out")
    say(console, f"chat template: {origin}")
    quality = check(rowfile, valid_rows, [*encoded, *held_out], tokenizer, validation_file)
    console.print(quality.table())
    if config.strict and quality.fatal():
        found = "; ".join(finding.message for finding in quality.fatal())
        raise UsageError(f"{config.data}: {found}; or leave --strict out")
    general = GeneralText(config.general, tokenizer, config.general_rows, config.max_length)
    _refuse_early(config, trainable(encoded), trainable(held_out), general)
    asked = valid_rows[: config.prompts]
    prompts = [prompt_text(row, tokenizer, template) for row in asked]
    if config.resume and (
        standing == "new" or not checkpoint.checkpoints(config.output / "checkpoints")
    ):
        say(console, f"{config.output}: no checkpoint to resume from: starting from the beginning")
    with quiet(), _out_of_memory():
        set_seed(config.seed)
        loaded = load_model(config)
    facts = describe.model_facts(
        loaded.model, config.model, loaded.architecture, config.method, config.quant
    )
    counts = f"{facts['parameters']:,} parameters, {facts['trainable']:,} trained"
    say(console, f"model: {loaded.architecture}, {counts}")
    if loaded.applied is not None:
        say(console, str(loaded.applied))
    export.claim(config, job, standing)

    def answer() -> list[str]:
        return answers(loaded.model, tokenizer, prompts, config.max_new_tokens, template)

    result = run(config, loaded, encoded, held_out, general, console, answer, parity)
    report: dict[str, Any] = {
        "pyft": pyft.__version__,
        "command": command,
        "config": config.model_dump(mode="json"),
        "versions": describe.versions(),
        "machine": describe.machine(),
        **result,
        "model": facts,
        "data": {
            "file": str(config.data),
            "format": rowfile.shape,
            "rows": rowfile.total,
            "train_rows": len(train_rows),
            "validation_rows": len(valid_rows),
            **result["data"],
            "template": origin,
        },
        **quality.to_dict(),
        "fused": [asdict(entry) for entry in loaded.applied.modules] if loaded.applied else [],
        "answers": [
            {"prompt": prompt, "expected": answer_text(row), "before": before, "after": after}
            for prompt, row, before, after in zip(
                prompts, asked, *result["answers"].values(), strict=True
            )
        ],
    }
    with quiet():
        export.export(config, loaded.model, tokenizer, template, report, write_report)
    say(console, f"{report['outcome']}; written to {config.output}")
    return report


def _refuse_early(
    config: Config,
    train: Sequence[Encoded],
    valid: Sequence[Encoded],
    general: GeneralText | None,
) -> None:
    """Raise UsageError for what these trainable rows or the installed packages cannot give."""
    if not train:
        raise UsageError(f"{config.data}: no row has a token to train on; see the data check")
    if config.patience is not None and not valid:
        raise UsageError("patience: there is no validation row; set validation to more, or a file")
    if config.replay:
        replay_rows(config.replay, sum(len(row.input_ids) for row in train), general)
    if config.tensorboard:
        _summary_writer()


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Say in one line what an allocation that failed means."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or ["no memory left"]
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in lines[0]:
            raise
        raise PyftError(
            f"out of memory ({lines[0]}); lower batch_size or max_length, turn "
            "gradient_checkpointing on, or take method qlora"
        ) from error


@_out_of_memory()
def run(
    config: Config,
    loaded: Any,
    train_encoded: Sequence[Encoded],
    valid_encoded: Sequence[Encoded],
    general: GeneralText | None,
    console: Console,
    answers: Callable[[], list[str]] | None = None,
    parity: Parity | None = None,
) -> dict[str, Any]:
    """Train `loaded.model` and measure it before, during and after.

    Continues from the newest checkpoint in config.output/checkpoints when there is one of this job.
    Leaves the weights to export in the model. `answers` gives the model's answers to the report's
    prompts; `parity(loaded, batch)` compares its fused ops on one real batch.

    Returns the report's entries outcome, curve, evaluations, forgetting, task, answers (two lists),
    parity, performance and data (token counts; packing: "isolated", or "off: " and why). Raises
    PyftError when the loss diverges or a checkpoint cannot be written, UsageError for a checkpoint
    of another job.
    """
    model = loaded.model.to(run_device())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    amp = train_in_fp32(model, config.method, dtype)
    train, valid = trainable(list(train_encoded)), trainable(list(valid_encoded))
    _refuse_early(config, train, valid, general)
    if config.replay:
        tokens = sum(len(row.input_ids) for row in train)
        extra, times = replay_rows(config.replay, tokens, general)
        train += extra
        if times > 1:
            say(console, f"replay: the general text is used {times:.1f} times over")
    with precision(amp), quiet():
        packing = _packing(config, loaded, console)
    layout = config.model_copy(update={"pack": packing == ISOLATED})
    packed = Packed(train, layout, loaded.tokenizer)
    held_out = Packed(valid, layout, loaded.tokenizer) if valid else None
    directory = config.output / "checkpoints"
    checkpoint.clean(directory)
    job = checkpoint.job(config)
    found = checkpoint.newest(directory, job)
    with precision(amp):
        remembered = remember_base(model, general) if general and config.method == "full" else None

    def measured() -> tuple[Estimate | None, Point | None]:
        with precision(amp):
            loss = evaluate_loss(model, held_out.batches(config.batch_size)) if held_out else None
            return loss, measure(model, general, remembered) if general else None

    use_cache = getattr(model.config, "use_cache", None)
    with quiet():
        loop = Loop(config, model, packed.rows, packed.collate, packed.lines, packed.tokens, amp)
        checkpoint_activations(model, config)
        if found is None:
            progress = checkpoint.Progress(job)
            progress.answers_before = answers() if answers else []
            Monitor(loop, progress, measured, TrainingProgress(console, loop.steps)).measure()
            if progress.outcome is not None:
                raise PyftError(
                    "the base itself is outside the forgetting budget: nothing to train"
                )
        else:
            progress = found[1]
            say(console, f"continuing at step {progress.step} of {loop.steps}, from {found[0]}")
        if progress.outcome is None:
            _train(config, loop, progress, measured, console, found[0] if found else None)
            model = loop.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        exported = _settle(config, model, progress, directory)
        model.config.use_cache = use_cache
        if config.method == "full":
            model.to(dtype)
        after = answers() if answers else []
        batch = next(packed.batches(1))
        checks = _compared(parity, loaded, batch, console) if parity else []
    results = _results(config, progress, exported, general, packed, after, checks)
    results["data"]["packing"] = packing
    results["forgetting"]["why_no_kl"] = remembered.why_no_kl if remembered else None
    return results


def _packing(config: Config, loaded: Any, console: Console) -> str:
    """ISOLATED when rows may be packed, else "off: " and why; see packing.isolates."""
    if not config.pack:
        return "off: pack is false"
    if isolates(loaded.model):
        return ISOLATED
    why = f"{loaded.architecture} lets packed rows see each other"
    say(console, f"packing: {why}; rows are not packed")
    return f"off: {why}"


def _compared(
    parity: Parity, loaded: Any, batch: dict[str, Tensor], console: Console
) -> list[dict[str, Any]]:
    """The rows of `parity`; when it fails, one failed row that says why."""
    try:
        return parity(loaded, batch)
    except Exception as error:  # whatever it is: the trained weights must still be exported
        lines = str(error).splitlines() or [""]
        why = f"not compared: {type(error).__name__}: {lines[0]}"
        say(console, f"kernel parity: {why}")
        entry = {"op": "lora_linear", "module": "", "backend": "", "quantity": why}
        return [{**entry, "max_error": None, "allowed": None, "passed": False}]


def _train(
    config: Config,
    loop: Loop,
    progress: checkpoint.Progress,
    measured: Callable[[], tuple[Estimate | None, Point | None]],
    console: Console,
    resume: Path | None,
) -> None:
    events = None
    if config.tensorboard:
        place = str(config.output / "tensorboard")
        events = _summary_writer()(place, purge_step=progress.step + 1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with TrainingProgress(console, loop.steps, progress.step) as display:
        loop.add_callback(Monitor(loop, progress, measured, display, events))
        try:
            loop.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            if events is not None:
                events.close()


def _settle(config: Config, model: Any, progress: checkpoint.Progress, directory: Path) -> int:
    """Put the weights that are exported into the model; the step they are from."""
    step = progress.step
    if progress.crossed_at is not None:
        step = progress.within_step
    elif config.patience is not None:
        step = progress.best_step
    path = checkpoint.checkpoints(directory).get(step)
    if path is None:
        raise PyftError(f"{directory}: checkpoint-{step} is gone, whose weights would be exported")
    checkpoint.load_weights(model, path)
    return step


def _summary_writer() -> Any:
    """The class that writes tensorboard's events; UsageError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "tensorboard: is not installed; pip install 'pyft[log]', or leave it out"
        ) from None
    return SummaryWriter


def _results(
    config: Config,
    progress: checkpoint.Progress,
    exported: int,
    general: GeneralText | None,
    packed: Packed,
    answers: list[str],
    parity: list[dict[str, Any]],
) -> dict[str, Any]:
    """The report's entries that come from training; see `run`."""
    losses = {entry["step"]: entry for entry in progress.evaluations}
    before, after = losses.get(0), losses.get(exported)
    return {
        "outcome": progress.outcome,
        "exported_step": exported,
        "curve": progress.curve,
        "evaluations": progress.evaluations,
        "forgetting": {
            "source": general.source if general else None,
            "tokens": general.tokens if general else None,
            "budget": config.forgetting_budget,
            "crossed_at": progress.crossed_at,
            "points": progress.forgetting,
        },
        "task": {
            "before": _bounds(before),
            "after": _bounds(after),
            "change": after["loss"] / before["loss"] - 1 if before and after else None,
        },
        "answers": {"before": progress.answers_before, "after": answers},
        "parity": parity,
        "data": {
            "train_tokens": sum(packed.tokens),
            "supervised_tokens": packed.supervised,
            "packed_rows": len(packed.tokens),
        },
        "performance": {
            "seconds": progress.seconds,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "peak_host_bytes": progress.peak_host_bytes,
            "peak_device_bytes": progress.peak_device_bytes,
        },
    }


def _bounds(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: entry[key] for key in ("loss", "low", "high")} if entry else None
