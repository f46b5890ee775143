"""Fine-tuning rows from the docstrings of the standard library: a coding helper in small.

The library is that of the running Python. Its sources are parsed, never imported, so nothing runs;
a few built-in modules, which have no source, are read through `inspect`. An entry is a public
function, class, method or module with its call as one writes it and the first paragraph of its
docstring. Each entry gives one row per kind of question; the answers are the library's own words.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = ("builtins", "cmath", "itertools", "math", "operator", "time")
LEFT_OUT = frozenset(
    {
        "antigravity",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
    }
)
NOT_PUBLIC = frozenset({"tests", "test", "__main__", "__pycache__", "site-packages"})
SHORTEST, LONGEST = 16, 400  # characters of a summary
LONGEST_CALL = 200

Message = dict[str, str]
Row = dict[str, list[Message]]


@dataclass(frozen=True, order=True)
class Entry:
    """One documented object.

    `name` is fully dotted, `call` is how one writes it in code, `summary` is one line, `parameters`
    are names (with their stars) and defaults as source text (None: required).
    """

    name: str
    kind: str
    call: str
    summary: str
    parameters: tuple[tuple[str, str | None], ...]


def summary_of(docstring: str | None) -> str | None:
    """The first paragraph on one line, or None when there is none that reads as a sentence."""
    if not docstring:
        return None
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    text = " ".join(paragraph.split()).replace("``", "`")
    if not SHORTEST <= len(text) <= LONGEST or not text[0].isalpha() or " " not in text:
        return None
    if not text.isascii() or not text.isprintable() or "->" in text:
        return None
    return text if text[-1] in ".!?:)" else text + "."


def _parameters(arguments: ast.arguments, method: bool) -> list[tuple[str, str | None]]:
    """Name (with its stars) and default of each parameter, without the first of a method."""
    positional = [*arguments.posonlyargs, *arguments.args]
    blanks: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    found = [(a.arg, d) for a, d in zip(positional, [*blanks, *arguments.defaults], strict=True)]
    if method:
        found = found[1:]
    if arguments.vararg:
        found.append((f"*{arguments.vararg.arg}", None))
    found += [(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        found.append((f"**{arguments.kwarg.arg}", None))
    return [(name, None if default is None else ast.unparse(default)) for name, default in found]


def _call(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    """`name(parameters)` as in the source, without annotations and without self."""
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(arguments)
    if method:
        text = re.sub(r"^\w+(?:, /)?(?:, |$)", "", text)
    return f"{name}({text})"


Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}


def _entries(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, (*Function, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        summary = summary_of(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            init = next(
                (n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None
            )
            if summary:
                yield Entry(
                    name,
                    "class",
                    _call(name, init, True) if init else f"{name}()",
                    summary,
                    tuple(_parameters(init.args, True)) if init else (),
                )
            yield from _entries(node.body, name, True)
            continue
        decorators = _decorators(node)
        if not summary or decorators & {"property", "setter", "cached_property", "overload"}:
            continue
        method = in_class and "staticmethod" not in decorators
        yield Entry(
            name,
            "method" if in_class else "function",
            _call(name, node, method),
            summary,
            tuple(_parameters(node.args, method)),
        )


def _modules() -> Iterator[tuple[str, Path]]:
    """Dotted names and files of the public standard modules that have a source."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names - LEFT_OUT):
        files = [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]
        for path in (file for file in files if file.is_file()):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") or part in NOT_PUBLIC for part in parts):
                yield ".".join(parts), path


def _from_sources() -> Iterator[Entry]:
    for module, path in _modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        summary = summary_of(ast.get_docstring(tree))
        if summary:
            yield Entry(module, "module", f"import {module}", summary, ())
        yield from _entries(tree.body, module, False)


def _described(name: str, value: Any, kind: str) -> Iterator[Entry]:
    """The entry of a live object; nothing when it has no summary or no signature."""
    summary = summary_of(value.__doc__)
    if not summary:
        return
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError):
        return
    if kind == "method":
        parameters = parameters[1:]
    call = inspect.Signature(parameters)
    defaults = (None if p.default is p.empty else repr(p.default) for p in parameters)
    names = (str(p.replace(default=p.empty)) for p in parameters)
    yield Entry(name, kind, f"{name}{call}", summary, tuple(zip(names, defaults, strict=True)))


def _from_built_ins() -> Iterator[Entry]:
    for module in BUILT_IN:
        prefix = "" if module == "builtins" else f"{module}."
        for name, value in list(vars(importlib.import_module(module)).items()):
            if name.startswith("_") or not callable(value):
                continue
            is_class = isinstance(value, type)
            yield from _described(prefix + name, value, "class" if is_class else "function")
            if is_class and not issubclass(value, BaseException):
                for attribute, method in list(vars(value).items()):
                    if not attribute.startswith("_") and inspect.ismethoddescriptor(method):
                        yield from _described(f"{prefix}{name}.{attribute}", method, "method")


@functools.cache
def collect() -> tuple[Entry, ...]:
    """All entries, sorted by name; of entries with the same name or summary the first only."""
    seen: set[str] = set()
    kept: list[Entry] = []
    for entry in sorted([*_from_sources(), *_from_built_ins()], key=lambda e: (e.name, e.call)):
        key = entry.summary.lower()
        if key in seen or entry.name in seen or len(entry.call) > LONGEST_CALL:
            continue
        seen |= {key, entry.name}
        kept.append(entry)
    return tuple(kept)


def _explain(entry: Entry) -> tuple[str, str]:
    question = {
        "function": f"What does `{entry.name}` do?",
        "method": f"What does the method `{entry.name}` do?",
        "class": f"What is the class `{entry.name}` for?",
        "module": f"What is the module `{entry.name}` for?",
    }[entry.kind]
    return question, f"`{entry.call}`\n\n{entry.summary}"


def _parameter_line(name: str, default: str | None) -> str:
    if name.startswith("*"):
        kind = "keyword" if name.startswith("**") else "positional"
        return f"- `{name}`: any further {kind} arguments"
    return f"- `{name}`: required" if default is None else f"- `{name}`: `{default}` by default"


def _arguments(entry: Entry) -> tuple[str, str]:
    lines = "\n".join(_parameter_line(name, default) for name, default in entry.parameters)
    return f"Which arguments does `{entry.name}` take?", f"`{entry.call}`\n\n{lines}"


def _find(entry: Entry) -> tuple[str, str]:
    where = entry.name.rpartition(".")[0]
    place = f" of `{where}`" if where else " that is built in"
    return f"Which {entry.kind}{place} is this?\n\n{entry.summary}", f"`{entry.call}`"


def rows_of(entry: Entry) -> list[Row]:
    """The rows of one entry, one per kind of question that makes sense for it."""
    pairs = [_explain(entry)]
    if entry.parameters:
        pairs.append(_arguments(entry))
    if entry.kind != "module":
        pairs.append(_find(entry))
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    ]


def build_split(seed: int = 0, held_out: float = 0.05) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows; `held_out` is the share of objects, the same seed the same rows.

    All rows of an object are on one side, and so are all objects whose last name is the same
    (`bytes.strip` and `str.strip`), because their docstrings often say nearly the same.
    """
    entries = collect()
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.name.rpartition(".")[2].lower(), []).append(entry)
    names = sorted(groups)
    shuffler = random.Random(seed)
    shuffler.shuffle(names)
    train: list[Row] = []
    kept_aside: list[Row] = []
    objects = 0
    for name in names:
        side = kept_aside if objects < held_out * len(entries) else train
        objects += len(groups[name]) if side is kept_aside else 0
        side.extend(row for entry in groups[name] for row in rows_of(entry))
    shuffler.shuffle(train)
    shuffler.shuffle(kept_aside)
    return train, kept_aside


def build_rows(seed: int = 0) -> list[Row]:
    """All rows in the messages shape, in an order that depends on the seed alone."""
    return build_split(seed, held_out=0.0)[0]


def write_rows(path: Path, rows: list[Row] | None = None) -> int:
    """Write rows (default: all, seed 0) as jsonl; returns how many."""
    rows = build_rows() if rows is None else rows
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return len(rows)
