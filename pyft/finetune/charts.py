"""The charts of a run's report, as data.

A chart is data in the units of its axes: layers of lines, dots, segments, bars, rules and labels,
whose points are (x, y) or (x1, y1, x2, y2). The report's template turns it into pixels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Layer = dict[str, Any]

MINUS = "\u2212"


def charts(report: Report) -> list[dict[str, Any]]:
    """The page's charts; one without data has `missing`, the reason in words, and comes last."""
    drawn = [_losses(report), _tradeoff(report), _drift(report), _lengths(report)]
    return sorted(drawn, key=lambda chart: "missing" in chart)


def _losses(report: Report) -> dict[str, Any]:
    title = "Loss during training"
    curve = finite(report.get("curve"), "step", "loss")
    held_out = finite(report.get("evaluations"), "step", "loss")
    if not curve and not held_out:
        why = "No training step was logged and no validation loss was measured."
        return {"title": title, "missing": why}
    layers: list[Layer] = []
    legend = []
    if curve:
        steps, losses = [row["step"] for row in curve], [row["loss"] for row in curve]
        mean = list(zip(steps, smooth(losses), strict=True))
        raw = list(zip(steps, losses, strict=True))
        layers.append({"kind": "line", "style": "c1 faint", "points": raw})
        layers.append({"kind": "line", "style": "c1", "points": mean, "last": mean[-1][1]})
        legend += [("c1", "training, smoothed"), ("c1 faint", "training, as logged")]
    if held_out:
        layers += _series("c2", held_out, "loss", "low", "high")
        legend.append(("c2", "validation, 95 % interval"))
    note = "" if held_out else "No validation rows were held out: there is no validation loss."
    return _chart(
        title, note, "optimizer step", "loss (nats per token)", layers, legend, steps=True
    )


def _drift(report: Report) -> dict[str, Any]:
    title = "Forgetting during training"
    forgetting = report.get("forgetting") or {}
    points = finite(forgetting.get("points"), "step", "delta")
    if not points:
        why = "Forgetting was not measured: no general text was used."
        return {"title": title, "missing": why}
    layers = _budget(forgetting, "y") + _series("c4", points, "delta", "delta_low", "delta_high")
    legend = [("c4", "loss change, 95 % interval")]
    if kl := finite(points, "kl"):
        layers += _series("c3", kl, "kl", "kl_low", "kl_high")
        legend.append(("c3", "KL(base, tuned), 95 % interval"))
        note = "Both are 0 before the first step; below 0 the model got better at general text."
    else:
        why = forgetting.get("why_no_kl") or "the base's logits were not kept"
        note = f"KL was not measured: {why}."
    return _chart(title, note, "optimizer step", "nats per token", layers, legend, steps=True)


def _tradeoff(report: Report) -> dict[str, Any]:
    title = "Task gain against forgetting"
    forgetting = report.get("forgetting") or {}
    task = {row["step"]: row for row in finite(report.get("evaluations"), "step", "loss")}
    rows = [
        {**point, "task": task[point["step"]]["loss"], "up": task[point["step"]]}
        for point in finite(forgetting.get("points"), "step", "delta")
        if point["step"] in task
    ]
    if not rows:
        lacking = "general text was not measured" if task else "there is no validation loss"
        return {"title": title, "missing": f"Nothing to compare: {lacking}."}
    bars = [
        (row["delta_low"], row["task"], row["delta_high"], row["task"])
        for row in finite(rows, "delta_low", "delta_high")
    ]
    bars += [
        (row["delta"], row["up"]["low"], row["delta"], row["up"]["high"])
        for row in rows
        if finite([row["up"]], "low", "high")
    ]
    path = [(row["delta"], row["task"]) for row in rows]
    exported, last = report.get("exported_step"), rows[-1]["step"]
    names = {rows[0]["step"]: f"step {rows[0]['step']}", last: f"step {last}", 0: "before"}
    if exported not in (None, last):
        names[exported] = "before, exported" if exported == 0 else f"step {exported}, exported"
    labels = [
        {"kind": "label", "x": row["delta"], "y": row["task"], "text": names[row["step"]]}
        for row in rows
        if row["step"] in names
    ]
    layers = [
        *_budget(forgetting, "x"),
        {"kind": "segments", "style": "c5 faint", "points": bars},
        {"kind": "line", "style": "c5", "points": path},
        {"kind": "dots", "style": "c5", "points": path},
        *labels,
    ]
    axes = "general-text loss change (nats per token)", "task loss (nats per token)"
    note = "To the right more is forgotten, further down more is learnt: the lower left is best."
    return _chart(title, note, *axes, layers, [("c5", "each evaluation in turn, 95 % intervals")])


def _lengths(report: Report) -> dict[str, Any]:
    title = "Length of the rows"
    lengths = report.get("lengths") or {}
    bars = [(low, 0, high, rows) for low, high, rows in lengths.get("histogram") or []]
    if not bars:
        return {"title": title, "missing": "No length histogram was made."}
    unit = lengths.get("unit") or "tokens"
    limit = (report.get("config") or {}).get("max_length") if unit == "tokens" else None
    marks = [(lengths.get(f"p{part}"), "zero", f"{part} % \u2264") for part in (50, 90, 99)]
    rules = [
        {"kind": "rule", "style": style, "x": at, "text": f"{text} {at}", "row": row}
        for row, (at, style, text) in enumerate([*marks, (limit, "limit", "max length")])
        if at is not None and bars[0][0] <= at <= bars[-1][2]
    ]
    room = {"kind": "room", "y": 1.35 * max(bar[3] for bar in bars)}
    layers = [{"kind": "bars", "style": "c1", "points": bars}, *rules, *([room] if rules else [])]
    return _chart(title, "", f"{unit} per row", "rows", layers, [], steps=True, whole=True)


def _chart(
    title: str,
    note: str,
    x_name: str,
    y_name: str,
    layers: list[Layer],
    legend: list[tuple[str, str]],
    steps: bool = False,
    whole: bool = False,
) -> dict[str, Any]:
    """A chart whose axes hold all its layers; `steps`: x is counted from 0, `whole`: so is y."""
    points = [point for layer in layers for point in layer.get("points", ())]
    across = [value for point in points for value in point[::2]]
    up = [value for point in points for value in point[1::2]]
    across += [layer["x"] for layer in layers if "x" in layer] + ([0] if steps else [])
    up += [layer["y"] for layer in layers if "y" in layer]
    x, y = axis(across, x_name, whole=steps, grow=not steps), axis(up, y_name, whole=whole)
    return {
        "title": title,
        "note": note,
        "x": x,
        "y": y,
        "layers": layers + _ends(layers, y),
        "legend": legend,
    }


def _series(style: str, rows: Sequence[Report], name: str, low: str, high: str) -> list[Layer]:
    """A line with dots over the steps, its intervals, and its last value for its end."""
    points = [(row["step"], row[name]) for row in rows]
    bars = [(row["step"], row[low], row["step"], row[high]) for row in finite(rows, low, high)]
    return [
        {"kind": "segments", "style": style, "points": bars},
        {"kind": "line", "style": style, "points": points, "last": points[-1][1]},
        {"kind": "dots", "style": style, "points": points},
    ]


def _budget(forgetting: Report, along: str) -> list[Layer]:
    """The line of no change and, where there is a budget, its line."""
    rules: list[Layer] = [{"kind": "rule", "style": "zero", along: 0.0, "text": ""}]
    if (budget := forgetting.get("budget")) is not None:
        text = f"budget {budget:g}"
        rules.append({"kind": "rule", "style": "limit", along: budget, "text": text})
    return rules


def _ends(layers: Sequence[Layer], y: Report) -> list[Layer]:
    """The last value of each line at the right edge, moved apart where two would touch."""
    gap, height, labels = (y["high"] - y["low"]) * 0.065, -math.inf, []
    for layer in sorted((part for part in layers if "last" in part), key=lambda part: part["last"]):
        height = max(layer["last"], height + gap)
        text = short(layer["last"])
        labels.append({"kind": "end", "style": layer["style"], "y": height, "text": text})
    return labels


def finite(rows: Iterable[Report] | None, *keys: str) -> list[Report]:
    """The rows that have a value for every key."""
    return [row for row in rows or [] if all(row.get(key) is not None for key in keys)]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twelfth of the points, unbiased at its start."""
    keep = 1 - 2 / (max(1, len(values) // 12) + 1)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """At most 7 round numbers (1, 2 or 5 times a power of ten apart) that lie in [low, high]."""
    rough = max((high - low) / 5, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def axis(
    values: Iterable[float], name: str, whole: bool = False, grow: bool = True
) -> dict[str, Any]:
    """An axis that holds `values`: range (`grow`: up to the next ticks), ticks and name."""
    known = list(values)
    low, high = min(known), max(known)
    if high - low < 1e-9:
        low, high = low - (abs(low) * 0.1 or 0.01), high + (abs(high) * 0.1 or 0.01)
    marks = ticks(low, high, whole)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    if grow:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        marks = ticks(low, high, whole)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    labelled = [(at, _tick(at, digits)) for at in marks]
    return {"low": low, "high": high, "label": name, "ticks": labelled}


def _tick(value: float, digits: int) -> str:
    for least, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / scale:g}{unit}".replace("-", MINUS)
    text = f"{abs(value):.{digits}f}" if digits <= 5 else f"{abs(value):.0e}"
    return (MINUS if value < 0 and float(text) else "") + text


def short(value: float | None, digits: int = 3) -> str:
    """A number of any magnitude in few characters."""
    known = value is not None and math.isfinite(value)
    return f"{value:.{digits}g}".replace("-", MINUS) if known else "not finite"
