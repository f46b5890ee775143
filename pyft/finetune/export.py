"""The output directory: who may write to it, what it says about itself, and the finished files.

    OUTPUT/pyft.json                  state (running or finished), the job, the base's fingerprint
    OUTPUT/adapter_model.safetensors, adapter_config.json     a stock PEFT adapter; or
    OUTPUT/model*.safetensors, config.json                    a whole model (full fine-tuning)
    OUTPUT/tokenizer files, chat_template.jinja, report.json, report.html
    OUTPUT/checkpoints/               see checkpoint.py

Finished files are written to a temporary directory inside OUTPUT, flushed, and renamed one by one:
weights first, the configuration a loader looks for after them, pyft.json last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import pyft
from pyft.errors import PyftError, UsageError
from pyft.finetune import checkpoint
from pyft.finetune.config import Config

MARKER = "pyft.json"
CONFIGURATIONS = ("adapter_config.json", "config.json")
# Names that pyft writes: all that --overwrite removes.
PRODUCTS = (
    *CONFIGURATIONS,
    "adapter_model.safetensors",
    "model*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "report.json",
    "report.html",
    "checkpoints",
    "tensorboard",
)
SAMPLES = 8  # tensors whose first bytes are in the fingerprint
SAMPLE_BYTES = 4096


def check_output(config: Config, job: Mapping[str, Any]) -> Literal["new", "resume", "finished"]:
    """Whether the job may write to config.output, and where it stands there; changes nothing.

    "new": nothing there, or it will be overwritten; "resume": an unfinished run of this very job;
    "finished": --resume of a job that is done. Raises UsageError for every other content.
    """
    output = config.output
    _apart(config)
    if not output.exists():
        return "new"
    if not output.is_dir():
        raise UsageError(f"output: {output}: is a file; give the path of a directory")
    marker = read_marker(output)
    others = [path for path in output.iterdir() if not path.name.startswith(checkpoint.TEMPORARY)]
    if not others:
        return "new"
    if config.overwrite:
        if marker is None:
            raise UsageError(
                f"output: {output}: is not an output of pyft (it has no {MARKER}) and is not "
                "overwritten; give another directory"
            )
        return "new"
    if marker is None:
        raise UsageError(
            f"output: {output}: holds something else (such as {others[0].name}); "
            "give a new or empty directory"
        )
    changed = checkpoint.difference(marker["job"], job)
    if config.resume:
        if changed is not None:
            raise UsageError(
                f"output: {output}: holds another run: {changed}; change it back, give another "
                "directory, or start again with --overwrite"
            )
        if "base" in marker and marker["base"] != fingerprint(config.model):
            raise UsageError(
                f"output: {output}: the base model has changed since: {config.model} holds other "
                "weights; put the old ones back, give another directory, or start again with "
                "--overwrite"
            )
        return "finished" if marker["state"] == "finished" else "resume"
    if marker["state"] == "finished":
        raise UsageError(
            f"output: {output}: holds a finished run; give another directory, or add --overwrite"
        )
    if changed is not None or checkpoint.checkpoints(output / "checkpoints"):
        hint = "start again with --overwrite, or give another directory"
        hint = hint if changed else f"continue it with --resume, or {hint}"
        raise UsageError(f"output: {output}: holds an unfinished run; {hint}")
    return "new"


def claim(config: Config, job: Mapping[str, Any], state: str) -> None:
    """Make the directory this run's: mark it running, and for a new run remove what pyft wrote."""
    output = config.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(output)
        marker = {
            "pyft": pyft.__version__,
            "state": "running",
            "job": dict(job),
            "base": fingerprint(config.model),
        }
        checkpoint.write_json(output / MARKER, marker)
        if state == "new":
            for path in list(output.iterdir()):
                if not any(fnmatch(path.name, pattern) for pattern in PRODUCTS):
                    continue
                if path.is_dir() and not path.is_symlink():
                    checkpoint.remove_directory(path)
                else:
                    path.unlink()
        (output / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        reason = checkpoint.write_problem(error)
        raise UsageError(f"output: {output}: cannot be written: {reason}") from None


def export(
    config: Config,
    model: Any,
    tokenizer: Any,
    template: str | None,
    report: Mapping[str, Any],
    write_report: Callable[[dict[str, Any], Path], Any],
) -> None:
    """Write the finished files; killed at any moment, each file there is whole.

    Raises PyftError when the disk is full: the checkpoints are intact, --resume exports again.
    """
    output = config.output
    place = output / f"{checkpoint.TEMPORARY}export"
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        if hasattr(model, "peft_config"):
            model.peft_config["default"].base_model_name_or_path = str(config.model.resolve())
            checkpoint.save_weights(model, place)
        else:
            model.save_pretrained(place)
        if template:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(place)
        write_report(dict(report), place)
        for path in place.iterdir():
            checkpoint.flush(path)
        for path in sorted(place.iterdir(), key=lambda path: path.name in CONFIGURATIONS):
            path.replace(output / path.name)
        checkpoint.flush(output)
        place.rmdir()
        marker = read_marker(output) or {}
        marker |= {
            "state": "finished",
            "outcome": report.get("outcome"),
            "exported_step": report.get("exported_step"),
        }
        checkpoint.write_json(output / MARKER, marker)
    except Exception as error:
        shutil.rmtree(place, ignore_errors=True)
        reason = checkpoint.write_problem(error)
        if reason is None:
            raise
        raise PyftError(
            f"{output}: cannot be written: {reason}; the checkpoints are intact; make room and "
            "continue with --resume"
        ) from error


def read_marker(output: Path) -> dict[str, Any] | None:
    """The content of pyft.json; None when the directory has none. PyftError when it is damaged."""
    path = output / MARKER
    if not path.is_file():
        return None
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        if {"state", "job"} <= marker.keys():
            return dict(marker)
    except (ValueError, AttributeError):
        pass
    raise PyftError(f"{path}: is not a file that pyft wrote; give another output directory")


def fingerprint(model: Path) -> dict[str, str]:
    """What identifies a base model: a hash of all tensors' names and shapes, and one of weights.

    The second covers the dtype and first bytes of a few tensors, so that another model of the same
    architecture differs. Sharding does not matter. Reads headers and a few KiB.
    """
    tensors = _headers(model)
    names = sorted(tensors)
    shapes = hashlib.sha256(repr([(name, tensors[name][2]) for name in names]).encode())
    weights = hashlib.sha256()
    for name in names[:: max(1, len(names) // SAMPLES)]:
        path, dtype, _, start, end = tensors[name]
        with path.open("rb") as file:
            file.seek(start)
            weights.update(dtype.encode() + file.read(min(SAMPLE_BYTES, end - start)))
    return {"shapes": shapes.hexdigest(), "weights": weights.hexdigest()}


def check_adapter_matches(base: Path, adapter: Path) -> None:
    """Raise UsageError when the adapter in directory `adapter` was made for another base.

    An adapter of pyft carries its base's fingerprint; of any other, the shape of every LoRA pair is
    compared with the weight it sits on.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(
            f"{adapter}: holds no adapter_model.safetensors; give an adapter directory"
        )
    wrong = f"{adapter}: is an adapter for another base than {base}"
    marker = read_marker(adapter)
    if marker is not None and "base" in marker:
        now = fingerprint(base)
        if marker["base"] != now:
            same = marker["base"]["shapes"] == now["shapes"]
            why = "the same architecture with other weights" if same else "other layers or shapes"
            trained = f"it was trained on {marker['job'].get('model', 'another model')}"
            raise UsageError(f"{wrong} ({why}): {trained}; give that one")
        return
    base_tensors, adapter_tensors = _headers(base), _headers(adapter)
    matched = 0
    for name, entry in adapter_tensors.items():
        layer, found, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        target = base_tensors.get(f"{layer}.weight")
        if not found or target is None or target[1] == "U8" or len(target[2]) != 2:
            continue
        matched += 1
        rows, columns = target[2]
        expected, actual = (columns, entry[2][1]) if side == "A.weight" else (rows, entry[2][0])
        if side in ("A.weight", "B.weight") and expected != actual:
            raise UsageError(f"{wrong}: {layer} has {expected} features there and {actual} here")
    if not matched and all(entry[1] != "U8" for entry in base_tensors.values()):
        raise UsageError(f"{wrong}: none of its layers is in that model; give the base it is for")


def _headers(directory: Path) -> dict[str, tuple[Path, str, list[int], int, int]]:
    """name -> (file, dtype, shape, first byte, end byte) of every tensor in *.safetensors."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            raise UsageError(f"{path}: is not a safetensors file ({error})") from None
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                found[name] = (path, entry["dtype"], entry["shape"], start, end)
    if not found:
        raise UsageError(f"{directory}: holds no *.safetensors file; give a model directory")
    return found


def _apart(config: Config) -> None:
    """The output must neither be nor contain what the job reads: writing would destroy it."""
    output = config.output.resolve()
    for key in ("model", *checkpoint.FILES):
        path = getattr(config, key)
        if isinstance(path, Path) and (
            path.resolve() == output or output in path.resolve().parents
        ):
            raise UsageError(f"output: {config.output}: holds the {key}; give another directory")
