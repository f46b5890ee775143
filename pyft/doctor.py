"""What this installation can do, and what to do about each thing missing."""

import importlib
import importlib.metadata
import platform
import re
import shutil
from typing import Any

REQUIRED = ("torch", "triton", "numpy", "safetensors", "pydantic", "typer", "rich", "PyYAML")
EXTRAS = {
    "finetune": (
        "transformers",
        "peft",
        "accelerate",
        "tokenizers",
        "sentencepiece",
        "jinja2",
        "datasketch",
    ),
    "log": ("tensorboard",),
}


def examine() -> dict[str, Any]:
    """Versions, devices, extensions and backends of this installation, with advice for what is
    missing.

    Returns {"versions": {name: version or None}, "cpu": {...}, "gpus": [...], "availability": {op:
    {backend: "yes" or the reason why not}}, "advice": [one line each], "ready": bool}; ready means
    `pyft finetune` can run.
    """
    import torch

    from pyft import __version__
    from pyft.backend import availability, cpu_isa, obstacle

    advice = []
    versions: dict[str, str | None] = {"pyft": __version__, "python": platform.python_version()}
    for name in REQUIRED:
        versions[name] = _version(name)
        if versions[name] is None:
            advice.append(f"{name} is missing: pip install {name}")
        elif floor := _too_old(name):
            advice.append(_outdated(name, floor, f"{name}>={floor}"))
    for extra, names in EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        versions.update({name: _version(name) for name in names})
        if missing:
            advice.append(f"{', '.join(missing)} missing: pip install 'pyft[{extra}]'")
        floors = ((name, _too_old(name)) for name in names)
        advice += [_outdated(name, floor, f"pyft[{extra}]") for name, floor in floors if floor]
    cpu = {"threads": torch.get_num_threads(), "isa": cpu_isa()}
    if cpu["isa"] is None:
        advice.append(f"CPU kernels: {obstacle('quantize', 'cpu')}")
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        compute = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "bytes": properties.total_memory, "compute": compute})
    reason = obstacle("quantize", "cuda")
    if gpus and reason is not None:
        advice.append(f"CUDA kernels: {reason}")
    if not gpus:
        found = shutil.which("nvidia-smi")
        why = (
            "nvidia-smi is there: install a CUDA build of torch"
            if found
            else "training runs on the CPU"
        )
        advice.append(f"no GPU is visible to torch; {why}")
    needed = (*REQUIRED, *EXTRAS["finetune"])
    ready = all(_version(name) and not _too_old(name) for name in needed)
    return {
        "versions": versions,
        "cpu": cpu,
        "gpus": gpus,
        "availability": availability(),
        "advice": advice,
        "ready": ready,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _too_old(name: str) -> str | None:
    """The lowest version pyft takes, where the installed one is below it; else None."""
    installed = _version(name)
    try:
        requirements = importlib.metadata.requires("pyft") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return None
    floors = (re.match(r"([\w.-]+) *>= *([\d.]+)", line) for line in requirements)
    floor = next((at[2] for at in floors if at and at[1].lower() == name.lower()), None)
    if installed is None or floor is None or _release(installed) >= _release(floor):
        return None
    return floor


def _release(version: str) -> list[int]:
    """The leading numbers of a version, without zeros at the end: "2.13.0+cpu" is [2, 13]."""
    numbers = [int(number) for number in re.findall(r"\d+", re.sub(r"[^\d.].*", "", version))]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _outdated(name: str, floor: str, install: str) -> str:
    return f"{name} {_version(name)} is too old: needs >={floor}: pip install '{install}'"


def show(found: dict[str, Any]) -> Any:
    """The findings of ``examine`` for a terminal."""
    from rich.console import Group
    from rich.table import Table

    versions = Table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        versions.add_row(name, version or "[red]missing[/red]")
    backends = Table("op", *next(iter(found["availability"].values())), title="Backends")
    for op, answers in found["availability"].items():
        backends.add_row(op, *("yes" if answer == "yes" else "no" for answer in answers.values()))
    isa = found["cpu"]["isa"] or "no instruction set: not built"
    threads = found["cpu"]["threads"]
    cpu = f"CPU: {threads} thread{'' if threads == 1 else 's'}, kernels for {isa}"
    gpus = [
        f"GPU: {gpu['name']}, {gpu['bytes'] / 2**30:.1f} GiB, compute {gpu['compute']}"
        for gpu in found["gpus"]
    ]
    reasons = {
        f"{name} cannot run {op}: {answer}"
        for op, answers in found["availability"].items()
        for name, answer in answers.items()
        if answer != "yes" and not answer.startswith(f"{op} has no")
    }
    todo = [f"- {line}" for line in found["advice"]]
    state = "ready: `pyft finetune` can run" if found["ready"] else "not ready: see the advice"
    return Group(versions, cpu, *gpus, backends, *sorted(reasons), "Advice:", *todo, state)
