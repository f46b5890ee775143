"""The run's report: report.json for programs, report.html for people, some lines for the terminal.

The report is plain data. What was not measured is None or absent in it, and said in words on the
page. The page has its style and its charts (SVG) inside, loads nothing and runs no script. Every
text from outside is escaped by the template, report.html.j2.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pyft.errors import PyftError
from pyft.finetune.charts import MINUS, Report, charts, finite, short

CONTROL = {code: "\ufffd" for code in range(32) if code not in (9, 10)}
SEVERITIES = ("error", "warning", "info")
FIELDS = {  # what the page's text reads of each part; absent means not measured
    "model": "path architecture parameters trainable method quant weight_bytes",
    "data": "file format rows train_rows validation_rows train_tokens supervised_tokens "
    "packed_rows template",
    "machine": "cpu cores memory_bytes gpu",
    "forgetting": "source tokens points",
    "config": "",
    "versions": "",
}
DOTS = "\u2026"


def write_report(report: Report, directory: Path) -> Path:
    """Write report.json and report.html into `directory`, each whole or not at all.

    report.json is strict JSON: sorted keys, NaN and infinities as null. Both are rendered before
    either is written. Returns the page's path. Raises PyftError when they cannot be written; what
    was there before is then still there.
    """
    plain = strict(report)
    page = render(plain)
    data = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / "report.json", data)
        _replace(directory / "report.html", page)
    except OSError as error:
        raise PyftError(
            f"the report could not be written to {directory}: {error.strerror}"
        ) from error
    return directory / "report.html"


def summary(report: Report) -> Table:
    """The headline numbers of the page as a few lines for a rich console."""
    report = strict(report)
    table = Table.grid(padding=(0, 2))
    outcome = str(report.get("outcome") or "unknown")
    table.add_row(
        Text("outcome", "bold"), Text(outcome, "green" if outcome == "finished" else "yellow")
    )
    for label, value, detail in headline(report):
        table.add_row(Text(label.lower(), "bold"), Text(f"{value}  ").append(detail, "dim"))
    failed = [row for row in report.get("parity") or [] if not row["passed"]]
    if failed:
        table.add_row(
            Text("kernel parity", "bold"),
            Text(f"{len(failed)} checks failed: see the report", "red"),
        )
    return table


def strict(value: Any) -> Any:
    """`value` as strict JSON data: NaN and infinities as None, tuples as lists, paths as strings.

    Text that UTF-8 cannot hold gets a question mark. Raises TypeError for what is not data.
    """
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, Mapping):
        return {strict(str(key)): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, str | Path):
        return str(value).encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    raise TypeError(f"a report holds plain data, not {type(value).__name__}")


def headline(report: Report) -> list[tuple[str, str, str]]:
    """(label, value, detail) of task, forgetting, speed and memory; what is missing says so."""
    return [_task(report), _forgotten(report), _speed(report), _memory(report)]


def _task(report: Report) -> tuple[str, str, str]:
    task = report.get("task") or {}
    before, after = task.get("before") or {}, task.get("after") or {}
    if before.get("loss") is None or after.get("loss") is None:
        return "Task loss", "not measured", "no validation rows were held out"
    change = task.get("change")
    value = f"{before['loss']:.3f} \u2192 {after['loss']:.3f}"
    shown = "" if change is None else f"{signed(100 * change, 1)} %, "
    return "Task loss", value, f"{shown}{span(after, 'low', 'high', 3)} (nats per token)"


def _forgotten(report: Report) -> tuple[str, str, str]:
    label, forgetting = "General-text loss change", report.get("forgetting") or {}
    points = finite(forgetting.get("points"), "step", "delta")
    if not points:
        return label, "not measured", "no general text was used"
    exported = report.get("exported_step")
    point = next((row for row in points if row["step"] == exported), points[-1])
    details = [span(point, "delta_low", "delta_high", 4, plus=True)]
    if (
        finite([point], "delta_low", "delta_high")
        and point["delta_low"] <= 0 <= point["delta_high"]
    ):
        details.append("no change beyond chance")
    if (budget := forgetting.get("budget")) is not None:
        step = forgetting.get("crossed_at")
        verdict = "kept" if step is None else f"crossed at step {step}"
        details.append(f"budget {budget:g} {verdict}")
    if exported is not None and exported != points[-1]["step"]:
        details.append(f"measured at step {point['step']}")
    return label, f"{signed(point['delta'], 4)} nats", ", ".join(details)


def _speed(report: Report) -> tuple[str, str, str]:
    speed = report.get("performance") or {}
    if speed.get("tokens_per_second") is None:
        return "Speed", "not measured", "no training step was timed"
    parts = [f"{speed[key]:,} {key}" for key in ("tokens", "steps") if speed.get(key) is not None]
    if speed.get("seconds") is not None:
        parts.append(duration(speed["seconds"]))
    return "Speed", f"{speed['tokens_per_second']:,.0f} tokens/s", ", ".join(parts)


def _memory(report: Report) -> tuple[str, str, str]:
    peaks = report.get("performance") or {}
    host, device = peaks.get("peak_host_bytes"), peaks.get("peak_device_bytes")
    if device is not None:
        return "Peak memory", size(device), f"of GPU memory; host: {size(host)}"
    if host is not None:
        return "Peak memory", size(host), "of host memory; no GPU was used"
    return "Peak memory", "not measured", "the system gave no reading"


def signed(value: float, digits: int) -> str:
    """A change with its sign, a true minus, and no sign on zero."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def span(values: Report, low: str, high: str, digits: int, plus: bool = False) -> str:
    """The 95 % interval in words."""
    if values.get(low) is None or values.get(high) is None:
        return "interval unknown (too few sequences)"
    ends = (
        signed(values[key], digits) if plus else f"{values[key]:.{digits}f}" for key in (low, high)
    )
    return "95 % interval {} to {}".format(*ends)


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "not measured"
    power = min(4, max(0, int(math.log2(max(count, 1)) // 10)))
    return f"{count / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """Seconds as s, min s or h min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return "\u2013" if value is None else f"{value:,}"


def setting(value: Any, missing: str = "not set") -> str:
    """A configuration value as a person would write it."""
    if value is None:
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def fused_groups(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """Modules with the same `runs` and `why` merged; layer numbers in their names become *."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        name = re.sub(
            r"(?<=\.)\d+(?=\.|$)", "*", re.sub(r"^(base_model\.model\.)", "", row["module"])
        )
        groups.setdefault((row["runs"] or "", row["why"] or ""), Counter())[name] += 1
    return [
        {"runs": runs, "why": why, "count": names.total(), "names": list(names.items())}
        for (runs, why), names in sorted(groups.items(), key=lambda item: -item[1].total())
    ]


def parity_groups(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """The worst module of each op, backend and quantity of `count` compared, failures first."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["backend"], row["quantity"]), []).append(row)
    worst = [{**sorted(group, key=_excess)[-1], "count": len(group)} for group in groups.values()]
    return sorted(worst, key=lambda row: (row["passed"], row["op"], row["quantity"]))


def _excess(row: Report) -> tuple[bool, float]:
    error, allowed = row["max_error"], row["allowed"]
    return not row["passed"], math.inf if error is None or not allowed else error / allowed


def render(report: Report) -> str:
    """The page, from a report that `strict` has made plain."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, setting=setting, short=short, size=size, duration=duration
    )
    findings = sorted(
        report.get("findings") or [], key=lambda row: SEVERITIES.index(row["severity"])
    )
    parts = {
        name: dict.fromkeys(fields.split()) | (report.get(name) or {})
        for name, fields in FIELDS.items()
    }
    page = environment.get_template("report.html.j2").render(
        parts,
        outcome=report.get("outcome") or "unknown",
        headline=headline(report),
        answers=report.get("answers") or [],
        charts=charts(report),
        command=report.get("command"),
        findings=findings,
        fused=fused_groups(report.get("fused") or []),
        parity=parity_groups(report.get("parity") or []),
        pyft=report.get("pyft"),
    )
    return page.translate(CONTROL)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
