"""Attention a chunk of keys at a time: the whole's output and gradients, memory and shapes."""

import pytest
import torch
from attention_truth import check_bits, check_close
from shapes import dtype_name
from test_attention import DTYPE, make

import pyft


@DTYPE
@pytest.mark.parametrize("size", [1, 3, 16, 40, 41, 1000])
def test_chunks_are_the_whole(size: int, dtype: torch.dtype) -> None:
    for lengths, mask, options in (
        ((40, 40), {}, {}), ((23, 40), {"window": 7}, {"sinks": "own", "slopes": "bh"}),
        ((40, 23), {}, {"softcap": 3.0}), ((40, 40), {"causal": False}, {"sinks": "inf"}),
        ((9, 40), {"causal": False, "window": (12, 3)}, {"slopes": "h"}),
        ((9, 40), {"window": (30, -12)}, {"sinks": "own"}),
        ((9, 40), {"causal": False, "window": (-3, 5)}, {}),
        ((9, 0), {}, {"sinks": "own"}), ((0, 9), {}, {}), ((5, 40), {"window": (2, -60)}, {}),
    ):  # fmt: skip
        problem = make(
            dtype=dtype, lengths=lengths, mask=mask, dims=(16, 24), arriving="both", **options
        )
        del problem.options["shift"]
        truth = problem.truth()
        whole = problem.run()
        found = problem.run(pyft.chunked_attention, chunk_size=size)
        assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in whole.items()}
        check_close(found, truth)
        for name in ("k", "v"):
            problem.inputs()[name].requires_grad_(False)
        part = problem.run(pyft.chunked_attention, chunk_size=size)
        check_bits(part, {name: found[name] for name in part})


@pytest.mark.parametrize("sinks", [None, "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_chunks_compile(dtype: torch.dtype, sinks: str | None) -> None:
    problem = make(dtype=dtype, lengths=(9, 14), sinks=sinks, arriving="both")
    del problem.options["shift"]
    truth = problem.truth()
    with pyft.backend("reference"):
        check_close(problem.run(pyft.chunked_attention, chunk_size=4), truth)
    check_close(problem.run(pyft.chunked_attention, chunk_size=4), truth)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            pyft.chunked_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        check_close(problem.run(compiled, chunk_size=4), truth)


@pytest.mark.parametrize("with_sinks", [True, False])
def test_chunks_pass_opcheck(with_sinks: bool) -> None:
    q, k, v = (torch.randn(1, h, s, 8, requires_grad=True) for h, s in ((4, 9), (2, 14), (2, 14)))
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    torch.library.opcheck(
        torch.ops.pyft.chunked_attention, (q, k, v, sinks, None, 0.5, 6, 0, None, 4, "auto")
    )


def test_chunks_that_nobody_sees_are_not_read() -> None:
    q, k, v = (torch.randn(1, 2, s, 8) for s in (4, 40, 40))
    expected = pyft.chunked_attention(q, k, v, 8, window=3)
    k[:, :, :34], v[:, :, :34] = torch.nan, torch.nan
    assert torch.equal(pyft.chunked_attention(q, k, v, 8, window=3), expected)


@pytest.mark.parametrize("window", [(None, -5), (None, -4), (2, -3), (-9, None)])
def test_windows_that_see_little(window: tuple[int | None, int | None]) -> None:
    """Bounds before the first key, and behind the last."""
    q, k, v = (torch.randn(1, 2, s, 8) for s in (12, 4, 4))
    expected = pyft.attention(q, k, v, causal=False, window=window, return_lse=True)
    found = pyft.chunked_attention(q, k, v, 3, causal=False, window=window, return_lse=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
