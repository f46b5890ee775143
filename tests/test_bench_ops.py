"""The ops of the harness on tiny shapes, and the shapes of real layers."""

from dataclasses import replace

import pytest
from bench_clock import CPU, TINY, Seconds, rows_of
from shapes import REAL_COLUMNS

from pyft.bench.backends import resolve
from pyft.bench.problems import OPS
from pyft.bench.run import run
from pyft.bench.shapes import MODELS, SETS, Layer, parse_layers
from pyft.errors import UsageError
from pyft.formats import FORMATS


def test_layers_of_known_models():
    assert MODELS["Llama-3.1-8B"].linears()["gate"] == (14336, 4096)
    assert MODELS["Gemma-2-2B"].linears()["q"] == (2048, 2304)
    assert MODELS["Qwen2.5-32B"].linears()["down"] == (5120, 27648)


def test_layers_by_name():
    def pairs(text: str) -> list[tuple[int, int]]:
        return [(layer.n, layer.k) for layer in parse_layers(text)]

    assert pairs("8b:gate") == [(14336, 4096)]
    assert pairs("Llama-3.1-8B") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert pairs("2b:q, 8b:o") == [(2048, 2304), (4096, 4096)]  # 32b is another size
    assert len(pairs("down")) == len({model.linears()["down"] for model in MODELS.values()})
    assert [(la.n, la.k) for la in parse_layers(None, ["14336x4096", "3x5"])] == [
        (14336, 4096),
        (3, 5),
    ]
    for name in SETS:
        assert parse_layers(name)


@pytest.mark.parametrize("text", ["13b", "8b:middle", "nonsense", "small:q"])
def test_unknown_layers(text):
    with pytest.raises(UsageError, match=r"--shapes: '.*' is unknown; use a set"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["14336", "0x5", "axb", "1x2x3", "-1x4"])
def test_malformed_shapes(text):
    with pytest.raises(UsageError, match=r"--shape: '.*' is not NxK"):
        parse_layers(None, [text])


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_right_and_measured(op):
    rows = [row for found in run([op], TINY, 0.0, clock=Seconds()) for row in found]
    cases = OPS[op].cases(TINY)
    assert len(rows) == len(cases) * len(OPS[op].variants)
    for row in rows:
        assert row["status"] == "ok", row
        assert row["bytes"] > 0
        assert row["copy_share"] > 0
        assert ("matmul_share" in row) == (row["flops"] > 0)
        assert row["peak_bytes"] >= 0
        assert row["median_ms"] == 1000.0
    assert [row["variant"] for row in rows[: len(OPS[op].variants)]] == list(OPS[op].variants)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_measured(format):
    request = replace(TINY, formats=(format,), backends=("all",), dtypes=("bf16", "fp16", "fp32"))
    rows = [row for op in ("dequantize", "quantize") for row in rows_of([op], request)]
    backends = resolve(("all",), "quantize", CPU)
    assert {row["backend"] for row in rows} == set(backends)
    assert all(row["status"] == "ok" for row in rows), rows
    assert {row["format"] for row in rows} == {format}


@pytest.mark.parametrize("k", REAL_COLUMNS)
def test_slivers_of_real_layers(k):
    request = replace(TINY, layers=[Layer(2, k)])
    assert all(row["status"] == "ok" for row in rows_of(["dequantize", "quantize"], request))


def test_peers_run_where_they_are_installed():
    pytest.importorskip("bitsandbytes")
    request = replace(TINY, peers=True, layers=[Layer(256, 128)])  # torchao needs 256 blocks
    for row in rows_of(["dequantize", "quantize", "qlinear"], request):
        peer = row["peers"]["bitsandbytes"]
        assert peer["status"] == "ok", peer
        assert peer["version"]
        assert peer["ratio"] == 1.0
        assert row["peers"]["torchao"]["status"] in ("ok", "not installed")


def test_lora_linear_beside_peft():
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    rows = rows_of(["lora_linear"], replace(TINY, peers=True))
    for row in rows:
        name = "peft" if row["format"] == "plain" else "peft+bitsandbytes"
        assert row["peers"][name]["status"] == "ok", row["peers"]
        assert row["peers"]["torch frozen linear"]["status"] == "ok"
