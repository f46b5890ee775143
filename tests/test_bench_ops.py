"""The ops of the harness on tiny shapes, and the shapes of real layers."""

from dataclasses import replace

import bitsandbytes
import peft
import pytest
from bench_clock import CPU, TINY, Seconds, rows_of
from shapes import REAL_COLUMNS

from pyft.backend import chosen, select
from pyft.bench.backends import on_backends, resolve
from pyft.bench.problem import Call, exact
from pyft.bench.problems import OPS, attention, loss
from pyft.bench.run import run
from pyft.bench.shapes import MODELS, SETS, Layer, models_of, parse_layers
from pyft.errors import UsageError
from pyft.formats import FORMATS


@pytest.fixture(autouse=True)
def tiny_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``TINY`` does not reach: the head of the losses, and a matmul beside attention."""
    monkeypatch.setattr(loss, "SIZES", {"cpu": ((1024, 320, 64),)})
    monkeypatch.setattr(attention, "MATMUL", 64)


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


def test_models_of_layers():
    small, large = MODELS["Llama-3.2-1B"], MODELS["Llama-3.1-8B"]
    assert models_of(parse_layers("8b:gate,8b:q,1b:k"), "cpu") == [large, small]
    assert models_of([], "cpu") == [small]
    assert models_of([], "gpu24") == [large]
    assert (small.head_dim, large.head_dim, MODELS["Gemma-2-2B"].head_dim) == (64, 128, 256)
    (by_hand,) = models_of([Layer(64, 128), Layer(64, 128)], "cpu")
    linears = by_hand.linears()
    assert linears["gate"] == linears["q"] == (64, 128)
    assert linears["k"] == linears["v"] == (16, 128)
    assert by_hand.head_dim == 16


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
    cases = [(case.shape, case.dtype, case.format) for case in OPS[op].cases(TINY)]
    found = [(row["shape"], row["dtype"], row["format"], row["variant"]) for row in rows]
    wanted = [(*case, variant) for case in cases for variant in OPS[op].variants]
    assert list(dict.fromkeys(found)) == wanted
    for row in rows:
        assert row["status"] == "ok", row
        assert row["bytes"] > 0
        assert row["copy_share"] > 0
        assert ("matmul_share" in row) == (row["flops"] > 0)
        assert row["peak_bytes"] >= 0
        assert row["median_ms"] == 1000.0


def test_auto_is_shown_as_what_it_chooses_and_runs_as_auto():
    best = select("quantize", CPU)
    assert resolve(("auto",), "quantize", CPU) == {best: "auto"}
    assert resolve(("auto", best, "reference"), "quantize", CPU) == {
        best: "auto",
        "reference": "reference",
    }
    assert resolve(("all",), "quantize", CPU)[best] == best
    seen = []
    (only,) = on_backends(TINY, "quantize", lambda: Call(lambda: seen.append(chosen())), exact([]))
    only.make().run()
    assert (only.name, seen) == (best, ["auto"])


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
    request = replace(TINY, peers=True, layers=[Layer(256, 128)])  # torchao needs 256 blocks
    for row in rows_of(["dequantize", "quantize", "qlinear"], request):
        peer = row["peers"]["bitsandbytes"]
        assert peer["status"] == "ok", peer
        assert peer["version"] == bitsandbytes.__version__
        assert peer["ratio"] == 1.0
        assert row["peers"]["torchao"]["status"] in ("ok", "not installed")


def test_lora_linear_beside_peft():
    rows = rows_of(["lora_linear"], replace(TINY, peers=True))
    for row in rows:
        name = "peft" if row["format"] == "plain" else "peft+bitsandbytes"
        assert row["peers"][name]["status"] == "ok", row["peers"]
        assert row["peers"][name]["version"] == peft.__version__
        assert row["peers"]["torch frozen linear"]["status"] == "ok"
