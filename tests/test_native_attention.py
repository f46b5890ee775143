"""The C++ attention against the reference, on every instruction set and any number of threads."""

from pathlib import Path

import pytest
import torch
from attention_cases import CASES, check, check_far
from quantize_truth import ISAS
from stored_weights import CPU
from torch import Tensor

from pyft import native

Rule = tuple[float, int | None, int | None, int, float | None, tuple[int, int, float] | None]

CAUSAL: Rule = (0.2, None, 0, 0, None, None)
EVERYTHING: Rule = (0.2, 150, 3, 1, 5.0, (7, 2**30, 4 / 3))
NAN = float("nan")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(monkeypatch: pytest.MonkeyPatch, name: str, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check(CASES[name], native, CPU) == ""


@pytest.mark.unfilled
@pytest.mark.parametrize("isa", ISAS)
def test_distances_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    assert check_far(native, CPU) == ""


def problem(
    dtype: torch.dtype, heads: tuple[int, int], seq: int, dims: tuple[int, int], batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of o."""
    (hq, hkv), (d, dv) = heads, dims
    shapes = ((hq, d), (hkv, d), (hkv, dv), (hq, dv))
    q, k, v, do = (torch.randn(batch, h, seq, width).to(dtype) for h, width in shapes)
    return q, k, v, do


def forward(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, bias: Tensor | None = None,
    slopes: Tensor | None = None, cu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, lse = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.empty(q.shape[:3])
    native.attention(q, k, v, None, bias, slopes, cu, cu, rule, o, lse)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor, lse: Tensor, rule: Rule,
    bias: Tensor | None = None, slopes: Tensor | None = None, cu: Tensor | None = None,
    wanted: str = "qkv",
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted."""
    delta = torch.empty_like(lse)
    native.attention_delta(o, do, None, delta)
    found = [
        torch.full_like(x, NAN) if n in wanted else None
        for n, x in zip("qkv", (q, k, v), strict=True)
    ]
    native.attention_backward(q, k, v, do, lse, delta, bias, slopes, cu, cu, rule, *found)
    return [x for x in found if x is not None]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (6, 3)], ids=["one", "grouped"])
def test_the_bits_do_not_depend_on_how_the_work_is_divided(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    """One thread takes whole kv heads; more threads than those queries and keys apart, as one does
    where not all gradients are wanted.
    """
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    q, k, v, do = problem(dtype, heads, 333, (24, 40))
    bias = torch.randn(1, 1, 333, 333).expand(1, heads[0], 333, 333)
    slopes = torch.rand(1, heads[0])
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        o, lse = forward(q, k, v, EVERYTHING, bias, slopes)
        gradients = backward(q, k, v, do, o, lse, EVERYTHING, bias, slopes)
        dbias = torch.full((1, 1, 333, 333), NAN)
        delta = torch.empty_like(lse)
        native.attention_delta(o, do, None, delta)
        native.attention_bias_backward(q, k, v, do, lse, delta, bias, slopes, EVERYTHING, dbias)
        found.append([o, lse, delta, dbias, *gradients])
    for results in found[1:]:
        assert all(map(torch.equal, results, found[0]))
    apart = [backward(q, k, v, do, o, lse, EVERYTHING, bias, slopes, wanted=n)[0] for n in "qkv"]
    assert all(map(torch.equal, apart, found[0][-3:]))


@pytest.mark.parametrize("isa", ISAS)
def test_packed_sequences_are_as_apart(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """The same bits as each alone; dropout counts queries from the beginning of the row."""
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    q, k, v, do = problem(torch.bfloat16, (4, 2), 420, (32, 32))
    cu = torch.tensor([0, 150, 150, 151, 420], dtype=torch.int32)
    o, lse = forward(q, k, v, CAUSAL, cu=cu)
    together = [o, lse, *backward(q, k, v, do, o, lse, CAUSAL, cu=cu)]
    for begin, end in ((0, 150), (150, 151), (151, 420)):
        parts = [x[:, :, begin:end] for x in (q, k, v, do)]
        o, lse = forward(*parts[:3], CAUSAL)
        alone = [o, lse, *backward(*parts, o, lse, CAUSAL)]
        assert all(torch.equal(x[:, :, begin:end], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 8])  # whole kv heads; queries and keys apart
def test_what_nobody_sees_is_skipped(
    monkeypatch: pytest.MonkeyPatch, isa: str, threads: int
) -> None:
    """NaN in tiles that are masked does not matter, since they are not computed."""
    monkeypatch.setenv("PYFT_CPU_ISA", isa)
    torch.set_num_threads(threads)
    q, k, v, do = problem(torch.float32, (1, 1), 1024, (16, 16))
    window: Rule = (0.2, 60, 0, 0, None, None)
    o, lse = forward(q, k, v, window)
    clean = backward(q, k, v, do, o, lse, window)
    for x in (q, k, v, do):
        x[:, :, :256] = NAN
        x[:, :, 768:] = NAN
    rest = slice(512, 640)
    again, _ = forward(q, k, v, window)
    assert torch.equal(again[:, :, rest], o[:, :, rest])
    for x, y in zip(backward(q, k, v, do, o, lse, window), clean, strict=True):
        assert torch.equal(x[:, :, rest], y[:, :, rest])


def test_memory_grows_with_the_tokens_alone() -> None:
    """With room for a hundredth of the scores."""
    resource = pytest.importorskip("resource")
    q, k, v, do = problem(torch.float32, (1, 1), 2**15, (4, 4))
    window: Rule = (0.5, 20, 0, 0, None, None)
    forward(*(x[:, :, :300] for x in (q, k, v)), window)  # what is loaded once
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30 // 100, limits[1]))
    try:
        o, lse = forward(q, k, v, window)
        gradients = backward(q, k, v, do, o, lse, window)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert all(x.isfinite().all() for x in (o, lse, *gradients))


def test_bad_sizes_are_refused() -> None:
    q, k, v, _ = problem(torch.float32, (3, 2), 5, (8, 8))
    with pytest.raises(ValueError, match="outside"):
        forward(q, k, v, CAUSAL)
