"""Results as JSON, as Markdown, and as a table for a terminal.

The JSON document (``SCHEMA`` 1) holds what is needed to read a figure later: versions, device,
commit, the command, and one row per op, shape, dtype, variant and backend of ours, with each peer's
figures and the ratio of our time to its time in ``peers``.
"""

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyft import __version__
from pyft.backend import cpu_isa
from pyft.bench import peers

SCHEMA = 1
Row = Mapping[str, Any]
Report = dict[str, Any]
HEADINGS = (
    "shape",
    "variant",
    "backend",
    "ms",
    "GB/s (of copy)",
    "TFLOP/s (of matmul)",
    "peak MiB",
)
AGAINST = "time / peer's (p10–p90)"


def describe(device: torch.device, command: str) -> Report:
    """A report without results: when, where and with what."""
    names = ("triton", *peers.PACKAGES, "numpy")
    versions: dict[str, str | None] = {"pyft": __version__, "python": platform.python_version()}
    versions |= {name: peers.version(name) for name in names}
    commit, changed = _commit()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "uncommitted_changes": changed,
        "versions": versions,
        "device": _device(device),
        "results": [],
    }


def _device(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": device.type,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
    }
    if device.type != "cuda":
        return found | {"name": found["cpu"]}
    card = torch.cuda.get_device_properties(device)
    return found | {
        "name": card.name,
        "compute": f"{card.major}.{card.minor}",
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """The checkout this runs from and whether it has changes; None, None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return head, bool(changes)


def strict(value: Any) -> Any:
    """The value as strict JSON data: NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(report: Report) -> str:
    """The report as text."""
    return json.dumps(strict(report), indent=1)


def write(path: Path, text: str) -> None:
    """Write a whole file at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def layers(rows: Iterable[Row]) -> str:
    """Where the shapes come from: ``14336x4096 is Llama-3.1-8B gate; ...``."""
    named = {
        f"{row['sizes'].get('N', '')}x{row['sizes'].get('K', '')}".strip("x"): row["layer"]
        for row in rows
        if row["layer"] and "K" in row["sizes"]
    }
    return "; ".join(f"{shape} is {layer}" for shape, layer in named.items())


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what heads a table: op, dtype and format."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = ", ".join(part for part in (row["op"], row["dtype"], row["format"]) if part)
        found.setdefault(title, []).append(row)
    return found


def cells(row: Row) -> list[str]:
    """A row's cells, in the order of ``HEADINGS``; what does not apply is empty."""
    shape = str(row["shape"])
    if row["status"] != "ok":
        return [shape, row["variant"], row["backend"], row["status"], "", "", ""]
    return [
        shape,
        row["variant"],
        row["backend"],
        figure(row["median_ms"]),
        _of(row, "gb_s", "copy_share"),
        _of(row, "tflop_s", "matmul_share"),
        figure(row["peak_bytes"] / 2**20),
    ]


def _of(row: Row, rate: str, share: str) -> str:
    """``21.3 (84 %)``; nothing where the op is far from bounded by it."""
    if rate not in row or row.get(share, 1.0) < 0.05:
        return ""
    return figure(row[rate]) + (f" ({100 * row[share]:.0f} %)" if share in row else "")


def beside(row: Row) -> list[tuple[str, str]]:
    """(peer, our time over its time with the spread), or why there is none."""
    found = []
    for name, peer in row["peers"].items():
        if "ratio" in peer:
            low, high = figure(peer["ratio_p10"], 2), figure(peer["ratio_p90"], 2)
            found.append((name, f"{figure(peer['ratio'])} ({low}–{high})"))
        elif peer["status"] == "ok":
            found.append((name, f"{figure(peer['median_ms'])} ms" if "median_ms" in peer else "-"))
        else:
            found.append((name, peer["status"]))
    return found


def remarks(rows: Iterable[Row]) -> list[str]:
    """One line for each thing that was not timed, and why; each line once."""
    found: dict[str, None] = {}
    for row in rows:
        where = " ".join(part for part in (row["op"], row["shape"], row["variant"]) if part)
        for name, entry in ((f"pyft {row['backend']}".strip(), row), *row["peers"].items()):
            if entry["status"] == "not installed":
                found[entry["reason"]] = None
            elif entry["status"] == "not run":
                found[f"{name}: {entry['reason']}"] = None
            elif entry["status"] != "ok":
                found[f"{where}: {name}: {entry['status']}: {entry['reason']}"] = None
    return list(found)


def figure(value: float, digits: int = 3) -> str:
    """As many significant digits, at most four decimals, never in exponents."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 4)}f}"


def columns(rows: Sequence[Row], newline: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table, without the columns that are empty in all rows."""
    headings = [*HEADINGS, AGAINST]
    lines = [
        [*cells(row), newline.join(f"{name} {text}" for name, text in beside(row))] for row in rows
    ]
    kept = [index for index in range(len(headings)) if any(line[index] for line in lines)]
    return [headings[i] for i in kept], [[line[i] for i in kept] for line in lines]


def heading(report: Report) -> str:
    """Device, threads and versions in one line."""
    device, versions = report["device"], report["versions"]
    where = device["name"] if device["type"] == "cuda" else f"{device['cpu']}, {device['isa']}"
    where += f", {device['threads']} threads"
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{where}; {used}"


def markdown(report: Report) -> str:
    """The report as a Markdown document."""
    commit = report["commit"] or "unknown"
    changed = " with uncommitted changes" if report["uncommitted_changes"] else ""
    lines = [
        f"{heading(report)}.",
        "",
        f"`{report['command']}`, {report['date']}, commit {commit[:12]}{changed}. Medians; "
        f"ratios are taken round by round. {layers(report['results'])}".rstrip(),
    ]
    for title, rows in groups(report["results"]).items():
        headings, body = columns(rows, "<br>")
        lines += ["", f"### {title}", "", _line(headings), _line(["---"] * len(headings))]
        lines += [_line(line) for line in body]
    notes = remarks(report["results"])
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def tables(report: Report) -> Any:
    """The report for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    shown: list[Any] = [escape(heading(report)), escape(layers(report["results"]))]
    for title, rows in groups(report["results"]).items():
        table = Table(title=escape(title), title_justify="left")
        headings, body = columns(rows, "\n")
        for name in headings:
            words = name in (*HEADINGS[:3], AGAINST)
            table.add_column(name, justify="left" if words else "right", no_wrap=words)
        for line in body:
            table.add_row(*map(escape, line))
        shown.append(table)
    shown += [escape(f"- {note}") for note in remarks(report["results"])]
    return Group(*shown)
