"""The command line. Heavy imports are inside the commands: `pyft --help` loads neither torch nor
transformers.

Exit codes: 0 done, 2 wrong use, 1 a run failed, 130 interrupted. Every error is one line on stderr;
    --debug adds the
traceback.
"""

import inspect
import json
import logging
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pyft import __version__
from pyft.errors import PyftError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="pyft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a language model on a small GPU, or on none.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at training data before training on it."
)
app.add_typer(data_app, name="data")

JsonFlag = Annotated[bool, typer.Option("--json", help="print the result as JSON and nothing else")]
ModelOption = Annotated[Path, typer.Option("--model", help="directory of the base model")]


def _version(show: bool) -> None:
    if show:
        print(f"pyft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command(short_help="Fine-tune the shipped model, show what changed.")
def demo(
    output: Annotated[Path, typer.Option(help="directory to write to")] = Path("pyft-demo"),
    short: Annotated[bool, typer.Option("--short", help="a few steps only, to see it run")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Fine-tune the model shipped with pyft on Python's docstrings and show what changed.

    Example: pyft demo --output pyft-demo
    """
    from pyft.finetune.demo import demo as run

    console = _console(quiet=json_output)
    report = run(output, console, short, _command_line())
    if json_output:
        _print_json(report)


@app.command(name="eval", short_help="Measure a model or an adapter.")
def evaluate(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="held-out rows or prompts, one JSON object per line")],
    adapter: Annotated[
        Path | None, typer.Option(help="directory of a LoRA adapter for that model")
    ] = None,
    quant: Annotated[
        str,
        typer.Option(help="a format such as nf4 or int8, or none to leave the weights as they are"),
    ] = "none",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32")] = "auto",
    max_length: Annotated[int, typer.Option(help="tokens per row; longer rows are cut")] = 1024,
    answers: Annotated[int, typer.Option(help="how many prompts to answer")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer")] = 64,
    chat_template: Annotated[Path | None, typer.Option(help="file with a chat template")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure a base model, with or without an adapter, on held-out rows or prompts.

    Example: pyft eval --model llama/ --adapter out/ --data held-out.jsonl
    """
    from pyft.finetune.evaluation import Settings, evaluate_files, show

    settings = Settings(
        model, data, adapter, quant, dtype, max_length, answers, max_new_tokens, chat_template
    )
    result = evaluate_files(settings)
    if json_output:
        _print_json(result)
    else:
        _console().print(show(result))


@data_app.command(short_help="Say what is wrong with a data file.")
def check(
    file: Annotated[Path, typer.Argument(help="the data, one JSON object per line")],
    model: Annotated[
        Path | None, typer.Option(help="count with this model's tokenizer and chat template")
    ] = None,
    format: Annotated[str, typer.Option(help="shape of the rows; auto: detected")] = "auto",
    max_length: Annotated[int, typer.Option(help="tokens per row; longer rows are cut")] = 1024,
    validation: Annotated[str, typer.Option(help="fraction held out, or a file")] = "0.05",
    strict: Annotated[bool, typer.Option("--strict", help="exit with 2 on any finding")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Say what is wrong with a data file: bad rows, duplicates, leaks, cut answers, lengths.

    Example: pyft data check train.jsonl --model llama/ --strict
    """
    from pyft.finetune.quality import check_file

    held_out = float(validation) if _is_number(validation) else Path(validation)
    quality = check_file(file, model, shape=format, max_length=max_length, validation=held_out)
    if json_output:
        _print_json(quality.to_dict())
    else:
        _console().print(quality.table())
    if strict and quality.fatal():
        raise UsageError(f"{file}: {len(quality.fatal())} kinds of problems; mend the lines listed")


@app.command(short_help="Say what this installation can do.")
def doctor(json_output: JsonFlag = False) -> None:
    """Say what this installation can do, and what to do about each thing missing.

    Example: pyft doctor
    """
    from pyft.doctor import examine, show

    found = examine()
    if json_output:
        _print_json(found)
    else:
        _console().print(show(found))
    if not found["ready"]:
        raise typer.Exit(1)


@app.command(short_help="Measure the kernels beside their peers.")
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="what to measure; nothing: all")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="say what can be measured")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="run other libraries beside, where installed")
    ] = False,
    shapes: Annotated[
        str | None, typer.Option(help="real layers: a size (8b), a linear (8b:down), a set (small)")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="a weight's shape NxK; may be repeated")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="rows of activations: 16,512,2048")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, or several: bf16,fp32")
    ] = None,
    format: Annotated[str | None, typer.Option(help="of quantized weights: nf4,int8")] = None,
    backend: Annotated[
        str, typer.Option(help="auto, all, reference, cpu, triton, cuda, or several")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    rank: Annotated[int, typer.Option(help="of adapters")] = 16,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own number")] = None,
    budget: Annotated[float, typer.Option(help="seconds of timing; checks come on top")] = 60,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the results here; - is the screen")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="write a Markdown table here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a chart to this PNG file")] = None,
) -> None:
    """Measure the kernels beside a copy, a matmul and other libraries; a wrong answer is not timed.

    Example: pyft bench dequantize qlinear --peers --shapes 8b:gate --json results.json
    """
    from pyft.bench.command import Options, listing, wrong
    from pyft.bench.command import bench as run
    from pyft.bench.report import tables, to_json

    on_screen = json_file is not None and str(json_file) == "-"
    console = _console(quiet=on_screen, wide=True)
    if show_list:
        console.print(listing())
        return
    options = Options(
        ops or (), peers, shapes, shape or (), tokens, dtype, format, backend, device, threads,
        rank, budget, json_file, markdown, plot,
    )  # fmt: skip
    report = run(options, _command_line(), lambda line: print(line, file=sys.stderr))
    console.print(tables(report))
    if on_screen:
        print(to_json(report))
    if count := wrong(report):
        raise PyftError(f"bench: {count} of pyft's own are wrong or failed; see the table's notes")


def finetune(config: Path | None = None, json_output: bool = False, **options: Any) -> None:
    """Fine-tune a model on a data file; write a PEFT adapter and a report.

    Example: pyft finetune --model llama/ --data train.jsonl --output out/
    """
    from pyft.finetune.config import load_config

    job = load_config(
        config, options
    )  # before the heavy imports: a wrong option is answered at once
    from pyft.finetune.parity import parity
    from pyft.finetune.report import summary
    from pyft.finetune.train import finetune as run

    console = _console(quiet=json_output)
    report = run(job, console, parity, _command_line())
    if json_output:
        _print_json(report)
    else:
        console.print(summary(report))


def _finetune_options() -> list[inspect.Parameter]:
    """The configuration's fields as options of `pyft finetune`; values stay text, the configuration
    checks them.
    """
    from pyft.finetune.config import Config, allowed

    def option(name: str, kind: Any, **settings: Any) -> inspect.Parameter:
        annotation = Annotated[kind | None, typer.Option(show_default=False, **settings)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, keyword, default=None, annotation=annotation)

    options = [option("config", Path, help="YAML file with any of the keys below")]
    for name, field in Config.model_fields.items():
        default = (
            "" if field.is_required() or field.default is None else f" [default: {field.default}]"
        )
        words = f"{field.description}{default}"
        if field.annotation in (bool, bool | None):
            options.append(option(name, bool, help=words, metavar=""))
        else:
            options.append(option(name, str, help=words, metavar=_metavar(allowed(name))))
    return options


def _metavar(allowed: str) -> str:
    """What an option takes, short: its choices, or its kind."""
    if allowed.startswith("one of "):
        return "|".join(allowed.removeprefix("one of ").split(", "))
    kinds = {"a path": "PATH", "a whole number": "INT", "a number": "NUMBER"}
    return next((short for words, short in kinds.items() if allowed.startswith(words)), "VALUE")


def _register_finetune(with_options: bool) -> None:
    """Add `pyft finetune`; reading the configuration's fields costs time that `pyft --help` need
    not pay.
    """

    def command(json_output: bool = False, **options: Any) -> None:
        finetune(json_output=json_output, **options)

    flag = inspect.Parameter(
        "json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonFlag
    )
    parameters = [*(_finetune_options() if with_options else []), flag]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    app.command(name="finetune", help=finetune.__doc__, short_help="Fine-tune a model on a file.")(
        command
    )


def main() -> NoReturn:
    """The entry point: run a command, turn errors into one line and an exit code."""
    # bitsandbytes, where it is installed, warns on import about a kernel nobody here asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _register_finetune(with_options="finetune" in arguments)
    try:
        code = app(args=arguments, prog_name="pyft", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command with --resume continues a fine-tuning run", 130, debug)
    except PyftError as error:
        _fail(str(error), error.exit_code, debug)
    except Exception as error:
        if isinstance(error, ImportError) and (package := _extra_package(error)):
            _fail(f"{package} is missing or too old: pip install 'pyft[finetune]'", 2, debug)
        if hasattr(error, "format_message"):  # the parser's: an unknown option, a missing value
            message = str(error.format_message()).strip().rstrip(".")
            if not message:  # no arguments: the help is printed already
                sys.exit(2)
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "pyft"
            _fail(f"{message}; see {command} --help", 2, debug)
        first = (str(error).strip().splitlines() or [""])[0]
        _fail(f"unexpected {type(error).__name__}: {first}; --debug shows the traceback", 1, debug)
    sys.exit(code or 0)


def _extra_package(error: ImportError) -> str | None:
    """The package of the extra finetune that could not be imported, or None for any other."""
    from pyft.doctor import EXTRAS

    # transformers names a dependency that is too old at the start of its message only
    name = re.match(r"\w*", error.name or str(error))
    return name[0] if name and name[0] in EXTRAS["finetune"] else None


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise
    print(f"pyft: {message}", file=sys.stderr)
    sys.exit(code)


def _console(quiet: bool = False, wide: bool = False) -> "Console":
    """A console on stdout, or with ``quiet`` on stderr; ``wide``: in a file 160 columns, not 80."""
    from rich.console import Console

    console = Console(stderr=quiet)
    if wide and not console.is_terminal:
        console.width = 160
    return console


def _print_json(value: Any) -> None:
    from pyft.finetune.report import strict

    print(json.dumps(strict(value), indent=2, sort_keys=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _command_line() -> str:
    return shlex.join(["pyft", *sys.argv[1:]])


if __name__ == "__main__":
    main()
