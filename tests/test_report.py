"""report.json and report.html: what they hold, what they escape, and how they are written."""

import copy
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pyft.errors import PyftError
from pyft.finetune import charts as drawing
from pyft.finetune import report as subject
from pyft.finetune.report import strict, summary, write_report

HOSTILE = "</pre></title><script>alert(1)</script><img src=http://x/y onerror=alert(2)>\"'&"
VOID = {"meta", "br", "img", "link", "hr", "input"}


def point(step, delta, kl=0.02):
    return {
        "step": step,
        "loss": 3.0 + delta,
        "loss_low": 2.9,
        "loss_high": 3.1,
        "kl": kl,
        "kl_low": kl,
        "kl_high": kl,
        "delta": delta,
        "delta_low": delta - 0.01,
        "delta_high": delta + 0.01,
    }


def full_report():
    layers = [
        f"base_model.model.model.layers.{i}.mlp.{m}" for i in range(3) for m in ("up", "down")
    ]
    return {
        "pyft": "0.1.0",
        "command": "pyft finetune --model m",
        "outcome": "finished",
        "config": {"rank": 16, "max_length": 64, "targets": ["q", "k"], "chat_template": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": 2**34, "gpu": None},
        "model": {
            "path": "models/tiny",
            "architecture": "LlamaForCausalLM",
            "parameters": 5123456,
            "trainable": 312320,
            "method": "qlora",
            "quant": "nf4",
            "weight_bytes": 3 << 20,
        },
        "data": {
            "file": "data.jsonl",
            "format": "messages",
            "rows": 1234,
            "train_rows": 1200,
            "validation_rows": 34,
            "train_tokens": 99999,
            "supervised_tokens": 55555,
            "packed_rows": 321,
            "template": "the model's own",
        },
        "findings": [
            {"code": "b", "severity": "info", "count": 1, "message": "as info", "lines": []},
            {
                "code": "a",
                "severity": "error",
                "count": 12,
                "message": "bad",
                "lines": [*range(12)],
            },
        ],
        "lengths": {
            "p50": 10,
            "p90": 30,
            "p99": 60,
            "max": 80,
            "histogram": [[0, 40, 7], [40, 80, 2]],
        },
        "fused": [{"module": name, "runs": "lora_linear", "why": None} for name in layers]
        + [{"module": "base_model.model.lm_head", "runs": None, "why": "no adapter"}],
        "curve": [
            {"step": s, "loss": 3 - s / 50, "learning_rate": 1e-4, "tokens": 10, "seconds": 1.0}
            for s in range(10, 101, 10)
        ],
        "evaluations": [
            {"step": 0, "loss": 4.0, "low": 3.9, "high": 4.1},
            {"step": 50, "loss": 2.5, "low": 2.4, "high": 2.6},
            {"step": 100, "loss": 1.5, "low": 1.4, "high": 1.6},
        ],
        "forgetting": {
            "source": "general.txt",
            "tokens": 4321,
            "budget": 0.05,
            "crossed_at": None,
            "points": [point(0, 0.0, 0.0), point(50, 0.02), point(100, 0.03)],
        },
        "task": {
            "before": {"loss": 4.0, "low": 3.9, "high": 4.1},
            "after": {"loss": 1.5, "low": 1.4, "high": 1.6},
            "change": -0.625,
        },
        "answers": [
            {"prompt": "q", "expected": "e", "before": "", "after": "line one\n  line two"}
        ],
        "parity": [
            {
                "op": "lora_linear",
                "module": name,
                "backend": "cpu",
                "quantity": "output",
                "max_error": 1e-7 * index,
                "allowed": 1e-6,
                "passed": True,
            }
            for index, name in enumerate(layers)
        ],
        "performance": {
            "seconds": 125.0,
            "steps": 100,
            "tokens": 1000000,
            "tokens_per_second": 8000.4,
            "peak_host_bytes": 3 * 2**29,
            "peak_device_bytes": None,
        },
    }


class Page(HTMLParser):
    """Tags seen, attributes, text, and whether every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page_of(report):
    html = subject.render(strict(report))
    return html, Page(html)


def terminal(report):
    console = Console(file=io.StringIO(), width=200)
    console.print(summary(report))
    return console.file.getvalue()


def test_the_page_holds_every_part(tmp_path):
    path = write_report(full_report(), tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    text = " ".join(Page(path.read_text()).text.split())
    for wanted in (
        "finished",
        "4.000 → 1.500",
        "−62.5 %, 95 % interval 1.400 to 1.600",
        "+0.0300 nats",
        "95 % interval +0.0200 to +0.0400, budget 0.05 kept",
        "8,000 tokens/s",
        "1,000,000 tokens, 100 steps, 2 min 5 s",
        "1.5 GiB",
        "5,123,456 parameters, 312,320 trained with qlora on nf4 weights (3.0 MiB)",
        "data.jsonl (messages): 1,234 rows",
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more",
        "model.layers.*.mlp.up × 3, model.layers.*.mlp.down × 3",
        "unchangedno adapterlm_head",
        "4,321 tokens that no step trained on",
        "max_length64",
        "chat_templatenot set",
        "torch2.13.0",
        "memory16.0 GiB",
        "pyft finetune --model m",
        "budget 0.05",
    ):
        assert wanted in text, wanted
    assert text.index("✕ error") < text.index("● info")
    assert "line one\n  line two" in Page(path.read_text()).text


def test_the_json_is_strict_sorted_and_the_same_data(tmp_path):
    report = full_report()
    report["curve"][3]["loss"] = math.nan
    report["task"]["change"] = np.float64(-0.625)
    report["performance"]["tokens_per_second"] = math.inf
    report["config"] |= {"data": Path("a/b"), "betas": (0.9, 0.99)}
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text()

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    assert found["curve"][3]["loss"] is None
    assert found["performance"]["tokens_per_second"] is None
    assert found["config"]["data"] == "a/b"
    assert found["config"]["betas"] == [0.9, 0.99]
    assert list(found) == sorted(found)
    assert text.startswith('{\n  "answers"')
    expected = full_report()
    for changed in ("curve", "performance", "config"):
        del found[changed], expected[changed]
    assert found == expected


def test_what_is_not_data_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set"):
        write_report({"outcome": {1}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", [HOSTILE, "\x00\x1b[31m\x07", "lone \udcff surrogate", "{{ 7 * 7 }}"]
)
def test_hostile_text_is_only_text_everywhere(text, tmp_path):
    def poisoned(value):
        if isinstance(value, dict):
            return {key: value[key] if key == "severity" else poisoned(value[key]) for key in value}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return text if isinstance(value, str) else value

    report = poisoned(full_report())
    report["config"][text] = text
    html = write_report(report, tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "http:" not in re.sub(re.escape("http://x/y"), "", html)
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    if text == HOSTILE:
        assert page.text.count(HOSTILE) > 15
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "49" not in re.findall(r"<h1>.*?</header>", html, re.DOTALL)[0] or text != "{{ 7 * 7 }}"


def test_nothing_is_loaded_from_outside():
    html, page = page_of(full_report())
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"url\(|@import|@font-face|https?:|//", html.replace("</", ""))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_an_empty_report_says_everything_in_words():
    _, page = page_of({})
    assert "svg" not in page.tags
    assert "table" not in page.tags
    text = " ".join(page.text.split())
    for wanted in (
        "no validation rows were held out",
        "no general text was used",
        "No training step was logged",
        "Nothing to compare: there is no validation loss.",
        "No prompts were answered",
        "No module was replaced",
        "No fused operation ran",
        "No length histogram",
    ):
        assert wanted in text, wanted
    assert text.count("not measured") >= 4
    for literal in ("None", "nan", "Undefined"):
        assert not re.search(rf"\b{literal}\b", text)
    assert "not measured" in terminal({})


@pytest.mark.parametrize(
    ("part", "charts", "words"),
    [
        ("evaluations", 3, "No validation rows were held out: there is no validation loss."),
        ("forgetting", 2, "Forgetting was not measured"),
        ("curve", 4, "validation, 95 % interval"),
        ("lengths", 3, "No length histogram was made."),
        ("answers", 4, "No prompts were answered in this run."),
        ("task", 4, "no validation rows were held out"),
    ],
)
@pytest.mark.parametrize("empty", [None, [], "absent"])
def test_a_missing_part_leaves_the_others(part, charts, words, empty):
    report = full_report()
    report[part] = empty
    if empty == "absent":
        del report[part]
    _, page = page_of(report)
    assert page.tags.count("svg") == charts
    assert words in " ".join(page.text.split())


def test_missing_intervals_and_kl_are_said():
    report = full_report()
    for row in report["forgetting"]["points"]:
        row.update(kl=None, kl_low=None, kl_high=None, delta_low=None, delta_high=math.nan)
    report["forgetting"]["why_no_kl"] = "the disk was too small"
    report["task"]["after"]["low"] = math.nan
    _, page = page_of(report)
    assert "nan" not in terminal(report)
    assert page.text.count("interval unknown (too few sequences)") == 2
    assert "KL was not measured: the disk was too small." in page.text
    assert "interval unknown" in terminal(strict(report))


def test_polylines_are_the_data_on_the_axes():
    """The drawn validation line, mapped back from pixels by two ticks of each axis, is the data."""
    html, _ = page_of(full_report())
    svg = html[html.index("<svg") : html.index("</svg>")]
    drawn = re.search(r'<polyline class="c2" points="([^"]*)"', svg).group(1).split()
    pixels = np.array([[float(part) for part in pair.split(",")] for pair in drawn])
    y = re.findall(r'<text class="tick" x="[\d.]+" y="([\d.]+)" dy="4"[^>]*>([\d.]+)<', svg)
    x = re.findall(r'<text class="tick" x="([\d.]+)" y="\d+" text-anchor="middle">(\d+)<', svg)
    (y0, v0), (y1, v1) = ((float(a), float(b)) for a, b in (y[0], y[-1]))
    (x0, s0), (x1, s1) = ((float(a), float(b)) for a, b in (x[0], x[-1]))
    np.testing.assert_allclose(
        (pixels[:, 0] - x0) / (x1 - x0) * (s1 - s0) + s0, [0, 50, 100], atol=0.1
    )
    np.testing.assert_allclose(
        (pixels[:, 1] - y0) / (y1 - y0) * (v1 - v0) + v0, [4.0, 2.5, 1.5], atol=0.01
    )


def test_everything_drawn_is_inside_the_picture():
    html, _ = page_of(full_report())
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        for name, value in re.findall(r'\b(x|y|x1|x2|y1|y2|cx|cy)="(-?[\d.]+)"', svg):
            assert 0 <= float(value) <= (480 if "x" in name else 300)
        for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+) ", svg):
            assert 0 <= float(pair[0]) <= 480
            assert 0 <= float(pair[1]) <= 300


finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(finite, st.floats(1e-6, 1e9), st.booleans())
def test_ticks_are_few_round_and_inside(low, width, whole):
    high = low + width
    if high - low < 1e-9 * max(1, abs(low)):
        return
    found = drawing.ticks(low, high, whole)
    assert len(found) <= 7
    slack = width * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= at <= high + slack for at in found)
    if len(found) > 1:
        step = found[1] - found[0]
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(lead - good) for good in (1, 2, 5)) < 1e-2
        assert not whole or step >= 1 - 1e-6


@given(st.lists(finite, min_size=1, max_size=20))
def test_an_axis_holds_its_values_and_labels_differ(values):
    found = drawing.axis(values, "name")
    assert found["low"] < found["high"]
    slack = (found["high"] - found["low"]) * 1e-6
    assert found["low"] - slack <= min(values)
    assert max(values) <= found["high"] + slack
    if max(values) - min(values) > 1e-5 * max(map(abs, values)):
        labels = [text for _, text in found["ticks"]]
        assert len(set(labels)) == len(labels)
        assert max(map(len, labels)) <= 10


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 300], ["0", "100", "200", "300"]),
        ([0, 0.05], ["0.00", "0.01", "0.02", "0.03", "0.04", "0.05"]),
        ([-0.02, 0.02], ["−0.02", "−0.01", "0.00", "0.01", "0.02"]),
        ([0, 50_000], ["0", "10k", "20k", "30k", "40k", "50k"]),
    ],
)
def test_tick_labels(values, labels):
    assert [text for _, text in drawing.axis(values, "")["ticks"]] == labels


def test_smoothing_is_an_unbiased_moving_average():
    assert drawing.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert drawing.smooth([5.0, 1.0, 3.0]) == [5.0, 1.0, 3.0]
    values = list(np.random.default_rng(0).standard_normal(60))
    keep = 1 - 2 / (60 // 12 + 1)
    weights = keep ** np.arange(30)[::-1]
    assert drawing.smooth(values)[29] == pytest.approx(np.average(values[:30], weights=weights))
    assert np.std(drawing.smooth(values)) < np.std(values)


def test_losses_that_are_not_finite_are_left_out_of_the_curve():
    report = full_report()
    report["curve"][-1]["loss"] = math.nan
    report["evaluations"][-1]["loss"] = math.inf
    html, page = page_of(report)
    assert "nan" not in html.lower().replace("finance", "")
    assert page.tags.count("svg") == 4


def test_parity_shows_the_worst_and_failures_first():
    report = full_report()
    report["parity"] += [
        {**report["parity"][0], "op": "rope", "max_error": math.nan, "passed": False},
        {**report["parity"][0], "op": "rope", "max_error": 5.0, "allowed": 9.0},
    ]
    first, second = subject.parity_groups(strict(report)["parity"])
    assert (first["op"], first["passed"], first["max_error"], first["count"]) == (
        "rope",
        False,
        None,
        2,
    )
    assert second["module"].endswith("layers.2.mlp.down")
    assert second["count"] == 6
    _, page = page_of(report)
    assert "✕ failed" in page.text
    assert "not finite" in page.text
    assert "1 checks failed" in terminal(report)


def test_close_end_labels_do_not_touch():
    y = {"low": 0.0, "high": 1.0}
    ends = drawing._ends([{"style": "c1", "last": last} for last in (0.9, 0.501, 0.5)], y)
    heights = [label["y"] for label in ends]
    assert np.diff(heights).min() >= 0.065 - 1e-9
    assert heights[2] == 0.9
    assert [label["text"] for label in ends] == ["0.5", "0.501", "0.9"]


def test_outcome_and_budget_of_a_stopped_run():
    report = full_report()
    report["outcome"] = "stopped: the budget was crossed"
    report["forgetting"] |= {"budget": 0.02, "crossed_at": 50}
    _, page = page_of(report)
    for text in (page.text, terminal(report)):
        assert "stopped: the budget was crossed" in text
        assert "budget 0.02 crossed at step 50" in text
    report["forgetting"]["points"] = [point(0, 0.0), point(100, 0.004)]
    assert "no change beyond chance" in terminal(report)


def test_the_headline_is_of_the_exported_weights():
    report = full_report()
    report["exported_step"] = 50
    report["forgetting"] |= {"budget": 0.025, "crossed_at": 100}
    _, page = page_of(report)
    text = terminal(report)
    assert "+0.0200 nats" in text
    assert "budget 0.025 crossed at step 100, measured at step 50" in text
    assert "step 50, exported" in page.text
    assert "step 100" in page.text
    report["exported_step"] = 100
    assert "+0.0300 nats" in terminal(report)
    assert "measured at" not in terminal(report)


def test_lengths_in_words_have_no_limit_in_tokens():
    report = full_report()
    report["lengths"]["unit"] = "words"
    _, page = page_of(report)
    assert "words per row" in page.text
    assert "max length 64" not in page.text
    del report["lengths"]["unit"]
    _, page = page_of(report)
    assert "tokens per row" in page.text
    assert "max length 64" in page.text


def test_a_package_that_is_absent_is_not_installed():
    report = full_report()
    report["versions"]["triton"] = None
    _, page = page_of(report)
    assert "tritonnot installed" in "".join(page.text.split("\n"))


def test_summary_has_the_numbers_of_the_page():
    text = terminal(full_report())
    _, page = page_of(full_report())
    for _, value, detail in subject.headline(full_report()):
        assert value in text
        assert value in page.text
        assert detail in text
        assert detail in page.text
    assert len(text.strip().splitlines()) == 5


def test_gpu_memory_is_named():
    report = full_report()
    report["performance"]["peak_device_bytes"] = 11 * 2**30
    assert "11.0 GiB  of GPU memory; host: 1.5 GiB" in terminal(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**29, "2.5 GiB"),
        (None, "not measured"),
    ],
)
def test_sizes(value, text):
    assert subject.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(4.21, "4.2 s"), (59.99, "60.0 s"), (61, "1 min 1 s"), (7322, "2 h 2 min")]
)
def test_durations(value, text):
    assert subject.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.50"), (-0.5, "−0.50"), (-0.001, "0.00"), (0.0, "0.00")]
)
def test_signs(value, text):
    assert subject.signed(value, 2) == text


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, failing):
    write_report(full_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = copy.deepcopy(full_report())
    changed["outcome"] = "stopped: something else"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    with pytest.raises(PyftError, match="No space left on device"):
        write_report(changed, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_report(changed, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert "something else" in (tmp_path / "report.html").read_text()


def test_the_report_given_is_not_changed(tmp_path):
    report = full_report()
    write_report(report, tmp_path)
    summary(report)
    assert report == full_report()
