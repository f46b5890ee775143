"""The chart of a report: for each op, how much faster than each peer, and how near to the ceiling.

Left, a peer's time over ours, on a logarithmic axis; 1 is as fast, to the right pyft is faster; the
whiskers are the 10th and 90th percentiles. Right, our share of a copy's bandwidth or of a matmul's
arithmetic measured in the same run, whichever is larger. Needs matplotlib.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyft.bench.report import Report, figure, groups, heading
from pyft.errors import UsageError

Row = Mapping[str, Any]
# Okabe and Ito's palette: told apart with any colour vision, and in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
COPY, MATMUL = "#7A8B99", "#3B4A57"
ROW_INCHES = 0.3
INK = "#222222"
SHARE_MAX = 125  # percent; a small tensor can beat a copy that misses the cache


def require() -> None:
    """Raise UsageError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'pyft[plot]'")


def draw(report: Report, path: Path) -> None:
    """Write the chart of a report's timed rows to ``path`` as PNG.

    Raises:
        UsageError: matplotlib is missing, or nothing was timed.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in report["results"] if row["status"] == "ok"]
    if not timed:
        raise UsageError("--plot: nothing was timed, so there is nothing to draw")
    panels = groups(timed)
    colours = colours_of([_peers(rows) for rows in panels.values()])
    heights = [sum(_slots(row) for row in rows) + 1.6 for rows in panels.values()]
    inches = sum(heights) * ROW_INCHES
    canvas = Figure(figsize=(13, inches + 1.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(
        len(panels), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 1.4)
    )
    canvas.suptitle(_wrapped(heading(report)), fontsize=8, color=INK, x=0.01, ha="left")
    for (title, rows), (left, right) in zip(panels.items(), axes, strict=True):
        places = _places(rows)
        _speed_panel(left, title, rows, places, colours)
        _ceiling_panel(right, rows, places)
    handles = [_patch(colour, f"over {name}") for name, colour in colours.items()]
    handles += [_patch(COPY, "of a copy's bandwidth"), _patch(MATMUL, "of a matmul's TFLOP/s")]
    canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, format="png")


def colours_of(panels: Sequence[Sequence[str]]) -> dict[str, str]:
    """A colour for each name, another one for each in a panel where that can be."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for names in panels for name in names):
        beside = {other for names in panels if name in names for other in names}
        taken = {found[other] for other in beside if other in found}
        used = list(found.values())
        found[name] = min([c for c in COLOURS if c not in taken] or COLOURS, key=used.count)
    return found


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _speedups(row)))


def _speedups(row: Row) -> dict[str, tuple[float, float, float]]:
    """Per peer timed with this row: its time over ours, low and high."""
    return {
        name: (1 / peer["ratio"], 1 / peer["ratio_p90"], 1 / peer["ratio_p10"])
        for name, peer in row["peers"].items()
        if "ratio" in peer
    }


def _slots(row: Row) -> float:
    """Bar places a row takes, with a gap after it."""
    return max(1, len(_speedups(row))) + 0.7


def _places(rows: Sequence[Row]) -> list[float]:
    """The middle of each row's bars, counted downwards."""
    middles, top = [], 0.0
    for row in rows:
        middles.append(top + (_slots(row) - 0.7) / 2)
        top += _slots(row)
    return middles


def _speed_panel(
    axis: Any, title: str, rows: Sequence[Row], places: Sequence[float], colours: Mapping[str, str]
) -> None:
    lows, highs = [1.0], [1.0]
    for row, middle in zip(rows, places, strict=True):
        found = _speedups(row)
        first = middle - (len(found) - 1) / 2
        for index, (name, (value, low, high)) in enumerate(found.items()):
            place = first + index
            axis.barh(place, value - 1, left=1, height=0.86, color=colours[name])
            axis.plot([low, high], [place, place], color=INK, linewidth=1)
            text = f"{figure(value)}×"
            axis.annotate(
                text, (max(value, high, 1.0), place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7, color=INK,
            )  # fmt: skip
            lows.append(low)
            highs.append(high)
    axis.set_xscale("log")
    axis.set_xlim(min(lows) / 1.15, max(highs) * 1.6)
    _log_ticks(axis, min(lows) / 1.15, max(highs) * 1.6)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_title(f"{title}: times faster than", fontsize=9, loc="left", color=INK)
    _style(axis, rows, places, labels=True)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 of each decade, or at each tenth of a narrow range, in plain figures."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    steps = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]
    if high / low < 6:
        steps = [n / 10 for n in range(1, 60) if n % (1 if high - low < 1.2 else 5) == 0]
    ticks = [tick for tick in steps if low <= tick <= high]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _ceiling_panel(axis: Any, rows: Sequence[Row], places: Sequence[float]) -> None:
    for row, place in zip(rows, places, strict=True):
        copy, matmul = row.get("copy_share", 0.0), row.get("matmul_share", 0.0)
        share = 100 * max(copy, matmul)
        end = min(share, SHARE_MAX)
        axis.barh(
            place, min(share, SHARE_MAX), height=0.86, color=MATMUL if matmul > copy else COPY
        )
        axis.annotate(
            f"{share:.0f} %", (end, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=7, color=INK,
        )  # fmt: skip
    axis.axvline(100, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, SHARE_MAX * 1.15)
    axis.set_title("share of the ceiling, %", fontsize=9, loc="left", color=INK)
    _style(axis, rows, places, labels=False)


def _style(axis: Any, rows: Sequence[Row], places: Sequence[float], labels: bool) -> None:
    several = len({row["backend"] for row in rows}) > 1
    texts = [
        ", ".join(filter(None, (row["shape"], row["variant"], row["backend"] * several)))
        for row in rows
    ]
    axis.set_yticks(places, texts if labels else [""] * len(rows), fontsize=8)
    axis.set_ylim(sum(_slots(row) for row in rows) - 0.4, -0.3)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 150))
