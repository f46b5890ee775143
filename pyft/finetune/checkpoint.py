"""Checkpoints that are either there and whole, or not there.

A checkpoint is filled in a temporary directory beside its final place; its files and the directory
are flushed to the disk, and one rename makes it visible. A process killed at any moment leaves the
earlier checkpoints as they were and at most one temporary directory, which `clean` removes.

    checkpoint-N/adapter_model.safetensors, adapter_config.json   the adapter as stock PEFT loads it
              or model.safetensors, config.json                   every weight (full fine-tuning)
                 optimizer.pt, scheduler.pt, scaler.pt            read with weights_only=True
                 rng_state.pth, trainer_state.json                in transformers.Trainer's formats
                 progress.json                                    Progress: what the report needs

Weights are never pickled.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyft.errors import PyftError, UsageError
from pyft.finetune.config import Config

# What may change between the parts of one run: none of it changes the result.
FREE = frozenset(
    [
        "output",
        "overwrite",
        "resume",
        "strict",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "tensorboard",
        "gradient_checkpointing",
    ]
)
FILES = ("data", "validation", "general", "chat_template")
TEMPORARY = ".pyft-unfinished-"


@dataclass
class Progress:
    """What a run has measured so far; with it a resumed run's report is that of an unbroken one.

    outcome is None while training goes on. window_loss and window_tokens are the loss summed over
    supervised tokens, and their number, since the last point of the curve. best_* and within_step
    name the steps that early stopping and the forgetting budget would export.
    """

    job: dict[str, Any]
    step: int = 0
    outcome: str | None = None
    seconds: float = 0.0
    tokens: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    forgetting: list[dict[str, Any]] = field(default_factory=list)
    answers_before: list[str] = field(default_factory=list)
    window_loss: float = 0.0
    window_tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    within_step: int = 0
    crossed_at: int | None = None
    peak_host_bytes: int = 0
    peak_device_bytes: int | None = None


def job(config: Config) -> dict[str, Any]:
    """What makes two runs the same run: every key that changes the result, files by their content.

    Raises UsageError when a file that the configuration names is missing.
    """
    values: dict[str, Any] = config.model_dump(mode="json", exclude=set(FREE))
    values["model"] = str(config.model.resolve())
    for key in FILES:
        path = getattr(config, key)
        if isinstance(path, Path):
            if not path.is_file():
                kind = "is a directory" if path.is_dir() else "no such file"
                raise UsageError(f"{key}: {path}: {kind}; give the path of a file")
            with path.open("rb") as file:
                values[key] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return values


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key in which two jobs differ, in words; None when they are the same."""
    for key, value in now.items():
        was = saved.get(key)
        if was != value:
            if str(was).startswith("sha256:") and str(value).startswith("sha256:"):
                return f"{key}: the content of the file has changed since"
            return f"{key} is {value!r} now and was {was!r}"
    return None


def checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by step, ascending."""
    found = {}
    for path in directory.glob("checkpoint-*") if directory.is_dir() else ():
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and (path / "progress.json").is_file():
            found[int(step)] = path
    return dict(sorted(found.items()))


def newest(directory: Path, now: Mapping[str, Any]) -> tuple[Path, Progress] | None:
    """The newest checkpoint and its progress; None when there is none.

    Raises UsageError, naming the key that differs, when it belongs to another job, and PyftError
    when its progress cannot be read.
    """
    found = checkpoints(directory)
    if not found:
        return None
    path = found[max(found)]
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise PyftError(
            f"{path}: is damaged ({error}); delete it to resume from the one before"
        ) from None
    key = difference(progress.job, now)
    if key is not None:
        raise UsageError(
            f"{path}: belongs to another run: {key}; change it back, or start again with "
            "--overwrite"
        )
    return path, progress


def save(
    directory: Path,
    progress: Progress,
    fill: Callable[[Path], None],
    keep: int,
    protected: Collection[int] = (),
) -> Path:
    """Write checkpoint-<step> atomically, then remove all but the newest `keep` and `protected`.

    `fill` writes everything but progress.json into the directory it is given. Raises PyftError when
    the disk is full or the directory cannot be written; the earlier checkpoints are then intact.
    """
    final = directory / f"checkpoint-{progress.step}"

    def whole(place: Path) -> None:
        fill(place)
        (place / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    try:
        write_directory(final, whole)
    except Exception as error:
        reason = write_problem(error)
        if reason is None:
            raise
        found = checkpoints(directory)
        last = f"{found[max(found)]} is intact" if found else "no earlier checkpoint exists"
        raise PyftError(
            f"{final}: cannot be saved: {reason}; {last}; make room and continue with --resume"
        ) from error
    found = checkpoints(directory)
    for step in list(found)[:-keep]:
        if step not in protected:
            remove_directory(found[step])
    return final


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling of `final`, flush it to the disk and rename it to `final`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    place = final.parent / f"{TEMPORARY}{final.name}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        fill(place)
        for path in [*place.rglob("*"), place]:
            flush(path)
        if final.exists():
            remove_directory(final)
        place.rename(final)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    flush(final.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one rename; it never holds half of it."""
    place = path.parent / f"{TEMPORARY}{path.name}"
    place.write_text(json.dumps(value, indent=1), encoding="utf-8")
    flush(place)
    place.replace(path)
    flush(path.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory; killed halfway, what is left has a temporary name."""
    place = path.parent / f"{TEMPORARY}removed-{path.name}"
    shutil.rmtree(place, ignore_errors=True)
    path.rename(place)
    shutil.rmtree(place)


def clean(directory: Path) -> None:
    """Remove what a killed run left unfinished directly inside `directory`."""
    for path in directory.glob(f"{TEMPORARY}*") if directory.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush(path: Path) -> None:
    """fsync one file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_problem(error: BaseException) -> str | None:
    """Why writing failed, in words, when it is the disk's fault and not the program's; else None.

    safetensors and torch wrap the operating system's error, so the text and the chain count too.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno is not None:
            full = current.errno in (errno.ENOSPC, errno.EDQUOT)
            return "no space left on the disk" if full else os.strerror(current.errno)
        _, found, code = str(current).rpartition("(os error ")
        if found and code[:-1].isdecimal():
            return write_problem(OSError(int(code[:-1]), ""))
        current = current.__cause__ or current.__context__
    return None


def save_weights(model: Any, directory: Path) -> None:
    """The trained weights: a stock PEFT adapter, or each trainable parameter under its name."""
    from safetensors.torch import save_file

    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        name, config = "adapter_model.safetensors", copy.copy(model.peft_config["default"])
        config.inference_mode = True
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        name, config = "model.safetensors", model.config
        weights = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    weights = {key: weight.contiguous() for key, weight in weights.items()}
    save_file(weights, directory / name, metadata={"format": "pt"})
    config.save_pretrained(directory)


def load_weights(model: Any, directory: Path) -> None:
    """Put a checkpoint's weights into the model, in place; every trained weight must be there.

    Raises PyftError when the file is damaged or its weights are not the model's.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    peft = hasattr(model, "peft_config")
    path = directory / ("adapter_model.safetensors" if peft else "model.safetensors")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PyftError(f"{path}: cannot be read ({error}); delete this checkpoint") from None
    if peft:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(expected.keys() ^ weights.keys())
    odd += [name for name in weights if not odd and weights[name].shape != expected[name].shape]
    if odd:
        raise PyftError(f"{path}: does not fit this model, beginning with {odd[0]}")
    if peft:
        set_peft_model_state_dict(model, weights)
        return
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


def save_torch(path: Path, value: Any) -> None:
    """torch.save through a Python file, whose errors say what the operating system said."""
    import torch

    with path.open("wb") as file:
        torch.save(value, file)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator, in the form that the Trainer restores."""
    import numpy as np
    import torch

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002, the global generator is what is restored
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state
