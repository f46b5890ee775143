"""The configuration of a fine-tuning job: one flat, strict model for YAML files and options alike.

A YAML key `learning_rate` is the option `--learning-rate`; an option wins over the file. Relative
paths, in a file too, start at the current directory, so that a line moved from a file to the
command line keeps its meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pyft.errors import UsageError


def _number(value: Any) -> Any:
    """Refuse true and false where a number is wanted: Python counts them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


def _path(value: Any) -> Any:
    """Expand `~`; refuse an empty path, which would silently mean the current directory."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty")
    return Path(value).expanduser() if isinstance(value, (str, Path)) else value


def _validation(value: Any) -> Any:
    """A number, also as text, is a fraction; any other text is a path."""
    if isinstance(value, bool):
        raise ValueError("is neither a fraction nor a path")
    if isinstance(value, (str, int, float)):
        try:
            fraction = float(value)
        except ValueError:
            return _path(value)
        if not 0 <= fraction < 1:
            raise ValueError("is not a fraction")
        return fraction
    return _path(value)


def _targets(value: Any) -> Any:
    """`q_proj,v_proj` on the command line is the list [q_proj, v_proj]."""
    if isinstance(value, str) and value != "all-linear":
        value = [part.strip() for part in value.split(",") if part.strip()]
    if value == []:
        raise ValueError("is empty")
    return value


def _quant(value: Any) -> Any:
    """A format of pyft.formats, which is looked up only where the key is given: it needs torch."""
    if value not in _formats():
        raise ValueError("is not a format")
    return value


def _formats() -> list[str]:
    from pyft.formats import FORMATS

    return list(FORMATS)


PathField = Annotated[Path, BeforeValidator(_path)]
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
SHAPES = Literal["auto", "messages", "prompt_completion", "text", "alpaca", "sharegpt"]


class Config(BaseModel):
    """One fine-tuning job. Field descriptions are the help text of the options of the same name."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: PathField = Field(
        description="directory of the base model (config.json and safetensors)"
    )
    data: PathField = Field(description="training data, one JSON object per line")
    output: PathField = Field(description="directory to write the adapter and the report to")

    method: Literal["qlora", "lora", "full"] = Field(
        "qlora", description="what is trained: LoRA on a quantized base, LoRA, or every weight"
    )
    quant: Annotated[str, BeforeValidator(_quant)] = Field(
        "nf4", description="format of the frozen weights under qlora: nf4, int4, fp8_e4m3, ..."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute dtype; auto: the best that the device runs natively"
    )
    seed: Whole = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of the split, the order, the adapter and the dropout",
    )
    overwrite: bool = Field(
        False, description="replace what an earlier run wrote to the output directory"
    )
    resume: bool = Field(False, description="continue the unfinished run in the output directory")
    strict: bool = Field(
        False, description="stop before training when the data check finds a problem"
    )

    rank: Whole = Field(16, ge=1, le=512, description="rank of the LoRA adapter")
    alpha: Real = Field(32.0, gt=0, description="LoRA alpha; the adapter is scaled by alpha / rank")
    dropout: Real = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapter")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    targets: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_targets)] = Field(
        "all-linear", description="names of the layers to adapt, or all-linear"
    )

    format: SHAPES = Field("auto", description="shape of the data rows; auto: detected and stated")
    max_length: Whole = Field(
        1024,
        ge=8,
        le=2**20,
        description="tokens per packed row; longer rows are cut, and that is reported",
    )
    validation: Annotated[float | Path, BeforeValidator(_validation)] = Field(
        0.05, description="fraction of the rows held out, or a file of validation rows"
    )
    pack: bool = Field(
        True, description="put several rows in one sequence, isolated from each other"
    )
    train_on: Literal["answer", "all"] = Field("answer", description="tokens the loss is taken on")
    chat_template: PathField | None = Field(
        None, description="file with a Jinja chat template; none: the model's own"
    )

    epochs: Real = Field(1.0, gt=0, le=1000, description="passes over the data")
    max_steps: Whole | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: Whole = Field(1, ge=1, le=4096, description="packed rows per forward pass")
    gradient_accumulation: Whole = Field(
        8, ge=1, le=4096, description="forward passes per optimizer step"
    )
    optimizer: Literal["adamw", "adamw8bit", "lion8bit", "sgd8bit"] = Field(
        "adamw", description="AdamW, or with 8-bit states AdamW, Lion or SGD with momentum"
    )
    learning_rate: Real = Field(2e-4, gt=0, le=1, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warmup"
    )
    warmup: Real = Field(
        0.03, ge=0, lt=1, description="fraction of the steps that raise the learning rate from zero"
    )
    weight_decay: Real = Field(0.0, ge=0, le=1, description="decoupled weight decay of AdamW")
    max_grad_norm: Real = Field(
        1.0, ge=0, description="gradients are scaled down to this norm; 0: never"
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in the backward; none: on a GPU only"
    )

    eval_every: Whole | None = Field(
        None, ge=1, description="steps between measurements; none: about five in a run"
    )
    save_every: Whole | None = Field(
        None, ge=1, description="steps between checkpoints; none: about five in a run"
    )
    log_every: Whole = Field(10, ge=1, description="steps between points of the loss curve")
    keep_checkpoints: Whole = Field(2, ge=1, description="newest checkpoints to keep")
    patience: Whole | None = Field(
        None, ge=1, description="stop after this many measurements without a better validation loss"
    )
    tensorboard: bool = Field(
        False, description="also write TensorBoard events to OUTPUT/tensorboard"
    )

    general: PathField | None = Field(
        None, description="text to measure forgetting on; none: the text shipped with pyft"
    )
    general_rows: Whole = Field(64, ge=1, description="rows of general text to measure on")
    forgetting_budget: Real | None = Field(
        None, gt=0, description="stop when the general-text loss rises by more, in nats per token"
    )
    replay: Real = Field(
        0.0, ge=0, lt=1, description="fraction of the training tokens taken from general text"
    )

    prompts: Whole = Field(4, ge=0, description="validation prompts to answer before and after")
    max_new_tokens: Whole = Field(64, ge=1, description="tokens per answer")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: continue the run, or start it again"
            )
        if self.patience is not None and self.validation == 0:
            raise ValueError(
                "patience needs validation rows: set validation to a fraction above 0 or a file"
            )
        return self


def allowed(key: str) -> str:
    """What the value of `key` may be, in words: "a whole number from 1 to 512"."""
    if key == "validation":
        return "a fraction from 0 to below 1, or the path of a file"
    if key == "quant":
        return "the name of a format"
    if key == "targets":
        return "all-linear, or a list of layer names"
    field = Config.model_fields[key]
    kinds = _kinds(field.annotation)
    text = (
        next(text for kind, text in _WORDS.items() if kind in kinds)
        if not kinds.get("choices")
        else None
    )
    if text is None:
        text = (
            "one of " + ", ".join(kinds["choices"])
            if len(kinds["choices"]) > 1
            else str(kinds["choices"][0])
        )
    return text + _range(field.metadata) + (", or null" if NoneType in kinds else "")


def _range(metadata: list[Any]) -> str:
    """The bounds among a field's constraints in words: " from 1 to 512", " above 0"."""
    bounds = {type(item): f"{_limit(item):.12g}" for item in metadata if isinstance(item, _BOUNDS)}
    if not bounds:
        return ""
    lower = f" from {bounds[Ge]}" if Ge in bounds else f" above {bounds[Gt]}"
    if Le in bounds:
        return f"{lower} to {bounds[Le]}" if Ge in bounds else f"{lower}, up to {bounds[Le]}"
    if Lt in bounds:
        return f"{lower} to below {bounds[Lt]}"
    return f"{lower} up" if Ge in bounds else lower


def _limit(item: Ge | Gt | Le | Lt) -> Any:
    return getattr(item, type(item).__name__.lower())


_BOUNDS = (Ge, Gt, Le, Lt)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def _kinds(annotation: Any) -> dict[Any, Any]:
    """The plain types inside an annotation, and the values of its Literal under "choices"."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation: True}
    if all(isinstance(argument, str) for argument in arguments):
        return {"choices": list(arguments)}
    found: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, type) or get_args(argument):
            found.update(_kinds(argument))
    return found


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Read a YAML file, put `overrides` (the same keys; None: not given) over it, check everything.

    Raises UsageError, one line: the file or option, the key, the value, what is allowed; an unknown
    key is answered with the nearest right one.
    """
    values, lines = _read(path) if path is not None else ({}, {})
    given = {key: value for key, value in overrides.items() if value is not None}
    source = {key: f"{path}, line {lines[key]}: {key}" for key in values}
    source |= {key: f"--{key.replace('_', '-')}" for key in given}
    for key in source:
        if key not in Config.model_fields:
            raise UsageError(f"{source[key]} is not a key of the configuration; {_nearest(key)}")
    merged = {**values, **given}
    try:
        return Config(**merged)
    except ValidationError as error:
        found: dict[str, str] = {}
        for detail in error.errors():
            key = str(detail["loc"][0]) if detail["loc"] else ""
            found.setdefault(key, _explain(key, merged, source, detail["msg"], path))
        raise UsageError("; ".join(found.values())) from None


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), Config.model_fields, n=1, cutoff=0.5)
    return f"write {near[0]}" if near else "see pyft finetune --help"


def _explain(
    key: str, values: dict[str, Any], source: dict[str, str], message: str, path: Path | None
) -> str:
    where = f"{path}: " if path else ""
    if not key:
        return where + message.removeprefix("Value error, ")
    if key not in values:
        option = key.replace("_", "-")
        return f"{where}{key} is missing; give --{option}, {Config.model_fields[key].description}"
    what = f"one of {', '.join(_formats())}" if key == "quant" else allowed(key)
    return f"{source[key]}: {values[key]!r} is not {what}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line of each key; UsageError where it is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give the path of a YAML configuration") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    try:
        return _mapping(path, yaml.SafeLoader(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        message = f"{where}: is not valid YAML ({problem}); write one 'key: value' per line"
        raise UsageError(message) from None


def _mapping(path: Path, loader: yaml.SafeLoader) -> tuple[dict[str, Any], dict[str, int]]:
    """The values and lines of the keys as written; YAMLError where the text is not YAML."""
    node = loader.get_single_node()
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}: holds no keys; write one 'key: value' per line")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, item in node.value:
        key, line = name.value, name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise UsageError(f"{path}, line {line}: a key is a list or a mapping; write a name")
        if name.tag == "tag:yaml.org,2002:merge":
            raise UsageError(f"{path}, line {line}: {key}: merge keys are not read; copy the keys")
        if key in lines:
            raise UsageError(f"{path}, line {line}: {key} is there twice; keep one of them")
        values[key], lines[key] = loader.construct_object(item, deep=True), line
    return values, lines
