"""What attention leaves alone, keeps and allocates; that it repeats itself, compiles, and writes
where it is told.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_truth import check_bits, check_close, check_rule
from lora_cases import Call, saved_by
from op_behaviours import (
    BEHAVIOUR,
    compiles_whole,
    gradcheck,
    passes_opcheck,
    under_a_dispatch_mode,
)
from shapes import dtype_name
from test_attention import DTYPE, make
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.bench.memory import peak_bytes

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"lengths": (7, 9), "dims": (8, 6)}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "sinks": "own", "bias": "1hqk", "slopes": "h", "dropout": 0.3, "softcap": 5.0,
        "mask": {"window": 5},
    },
    "packed": {"packed": torch.int32, "batch": 1, "sinks": "wide", "dropout": 0.3},
}  # fmt: skip


def call_of(case: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Call:
    problem = make(dtype=dtype, **(SMALL | CALLS[case] | sizes))
    numbers = {n: x for n, x in problem.options.items() if not isinstance(x, Tensor)}
    named = {n: x for n, x in problem.options.items() if isinstance(x, Tensor)}
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v} | named

    def run(t: Any) -> tuple[Tensor, ...]:
        others = {name: t[name] for name in named}
        found: tuple[Tensor, ...] = pyft.attention(
            t["q"], t["k"], t["v"], **others, **numbers, return_lse=True
        )
        return found

    def reference(t: Any) -> tuple[Tensor, ...]:
        with pyft.backend("reference"):
            return run(t)

    return Call("attention", inputs, run, reference, ("alibi_slopes",))


@BEHAVIOUR
@pytest.mark.parametrize("case", CALLS)
def test_behaviour(case: str, behaviour: Any) -> None:
    behaviour(call_of(case))


@pytest.mark.parametrize("case", CALLS)
def test_gradcheck(case: str) -> None:
    with pyft.backend("reference"):
        gradcheck(call_of(case, torch.float64, lengths=(3, 4), dims=(3, 2), heads=(2, 1)))
    gradcheck(call_of(case, torch.float64, lengths=(2, 3), dims=(2, 2), heads=(2, 1)))


@pytest.mark.parametrize("behaviour", [compiles_whole, passes_opcheck, under_a_dispatch_mode])
def test_behaviour_of_float64(behaviour: Any) -> None:
    behaviour(call_of("everything", torch.float64))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_autocast_casts_as_torch_does(name: str) -> None:
    """fp32 queries beside bf16 values, as rotary embeddings leave them, are one dtype there."""
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    leaves = [q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()]
    with pyft.backend(name), torch.autocast("cpu", torch.bfloat16):
        o = pyft.attention(*leaves)
        chunked = pyft.chunked_attention(*leaves, 3)
    assert o.dtype == chunked.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    with pyft.backend(name):
        expected = pyft.attention(*(x.bfloat16() for x in leaves))
    assert torch.equal(o, expected)


@DTYPE
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    for case in CALLS:
        problem = make(dtype=dtype, lengths=(90, 130), dims=(40, 24), heads=(6, 2),
                       arriving="both", **CALLS[case])  # fmt: skip
        first = problem.run()
        for i in range(100):
            torch.set_num_threads(1 + i % 2)
            check_bits(problem.run(), first)


@DTYPE
def test_long_rows(dtype: torch.dtype) -> None:
    """Many tiles, and split ones: still the rule."""
    for threads, lengths in ((2, (3, 900)), (1, (300, 300)), (3, (600, 5))):
        torch.set_num_threads(threads)
        features = {"lengths": lengths, "dims": (24, 40), "heads": (4, 1), "batch": 1}
        check_rule([make(dtype=dtype, arriving="both", **features) for _ in range(2)])
        windowed = {"mask": {"window": 100}, "sinks": "own", **features}
        check_rule([make(dtype=dtype, **windowed) for _ in range(10 if lengths[0] < 9 else 2)])


@pytest.mark.parametrize(
    "names",
    [n for i in (0, 1, 2, 5) for n in itertools.combinations(("q", "k", "v", "sinks", "bias"), i)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_only_these_gradients(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """The same bits as of all of them; the others are not computed."""
    problem = make(dtype=dtype, **SMALL, sinks="own", bias="1hqk", arriving="both")
    whole = problem.run()
    for name, x in problem.inputs().items():
        x.requires_grad_(name in names)
    o, lse = problem.forward()
    assert o.requires_grad == lse.requires_grad == bool(names)
    found = problem.backward((o, lse))
    check_bits(found, {f"d{name}": whole[f"d{name}"] for name in names})


def test_gradients_that_nobody_wants_take_no_memory() -> None:
    problem = make(lengths=(300, 300), dims=(64, 64), heads=(4, 4))
    b, hq, s, d = problem.q.shape
    for wanted in ("q", "k", "v"):
        for name, x in problem.inputs().items():
            x.requires_grad_(name == wanted)
        outputs = problem.forward()
        peak = peak_bytes(partial(problem.backward, outputs), CPU)
        assert peak <= 4 * b * hq * s * (d + 1) + 2048


def test_either_output_alone() -> None:
    problem = make(**SMALL, sinks="own", arriving="both")
    both = problem.run()
    do, dlse = problem.do, problem.dlse
    alone = []
    for arriving in ((do, None), (None, dlse)):
        problem.do, problem.dlse = arriving
        check_close(problem.run(), problem.truth())
        alone.append(problem.run())
    for name in ("dq", "dk", "dv", "dsinks"):
        torch.testing.assert_close(alone[0][name] + alone[1][name], both[name])
    only: Tensor = pyft.attention(problem.q, problem.k, problem.v, **problem.options)
    assert torch.equal(only, both["o"])


@DTYPE
def test_any_gradient_that_arrives(dtype: torch.dtype) -> None:
    """Whatever its strides: that of a sum, of a mean over heads, of a transposition."""
    problem = make(dtype=dtype, **SMALL, arriving="both")
    b = problem.q.shape[0]
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda o, lse: o.sum(), lambda o, lse: lse.sum(),
        lambda o, lse: o.sum() + lse[..., 0].sum(), lambda o, lse: o.mean(dim=1).square().sum(),
        lambda o, lse: o.mT.reshape(b, -1)[:, 3:].sum(),
        lambda o, lse: o.transpose(1, 2).flatten(2)[..., ::2].sum() + lse.mT.cumsum(1).sum(),
        lambda o, lse: o[:, :, -1].float().square().sum(),
    ]  # fmt: skip
    for loss in losses:
        o, lse = problem.forward()
        leaves = list(problem.leaves().values())
        found = torch.autograd.grad(loss(o, lse), leaves)
        at = [x.detach().requires_grad_() for x in (o, lse)]
        arriving = torch.autograd.grad(loss(*at), at, allow_unused=True)
        problem.do, problem.dlse = (None if x is None else x.contiguous() for x in arriving)
        whole = problem.backward(problem.forward())
        check_bits(dict(zip(whole, found, strict=True)), whole)


def test_what_is_kept() -> None:
    """The inputs, o and lse."""
    problem = make(lengths=(65, 65), dtype=torch.bfloat16, sinks="own", bias="1h1k", dropout=0.2)
    made: list[Tensor] = []
    kept = saved_by(lambda: made.extend(problem.forward()), list(problem.inputs().values()))
    sizes = sorted(x.untyped_storage().nbytes() for x in kept)
    assert sizes == sorted([8, *(x.untyped_storage().nbytes() for x in made)])


def test_lies_in_memory_as_projections_read_it() -> None:
    for layout in ("heads", "projections", "together"):
        problem = make(layout=layout)
        found = problem.run()
        for name in ("o", "dq", "dk", "dv"):
            assert found[name].transpose(1, 2).is_contiguous(), name
        assert found["lse"].is_contiguous()


def test_checkpointing_draws_the_same_seed_again() -> None:
    problem = make(**SMALL)
    options = problem.options | {"dropout_p": 0.5}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return pyft.attention(q, k, v, **options)

    leaves = list(problem.leaves().values())
    torch.manual_seed(3)
    expected = torch.autograd.grad(run(*leaves), leaves, problem.do)
    for reentrant in (True, False):
        torch.manual_seed(3)
        o = checkpoint(run, *leaves, use_reentrant=reentrant)
        for leaf in leaves:
            leaf.grad = None
        o.backward(problem.do)
        assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))  # type: ignore[arg-type]


def test_the_longest_lengths_may_be_given() -> None:
    problem = make(lengths=(20, 30), packed=torch.int32, batch=1)
    longest = {
        f"max_seqlen_{w}": int(problem.options[f"cu_seqlens_{w}"].diff().max()) for w in "qk"
    }
    check_bits(problem.run(**longest), problem.run())


# Where it is told to write.


@DTYPE
def test_o_beside_other_columns(dtype: torch.dtype) -> None:
    """Into the first columns of [x | S] rows, whose tail is written later."""
    for case in CALLS:
        problem = make(dtype=dtype, arriving="both", **SMALL, **CALLS[case])
        b, hq, s, d = *problem.q.shape[:3], problem.v.shape[3]
        expected = problem.run()
        rows = torch.full((b, s, hq * d + 5), torch.nan, dtype=dtype)
        out = rows[..., : hq * d].unflatten(-1, (hq, d)).transpose(1, 2)
        o, lse = problem.forward(out=out)
        assert o.data_ptr() == out.data_ptr()
        assert [a for a, n in zip(o.stride(), o.shape, strict=True) if n > 1] == [
            a for a, n in zip(out.stride(), o.shape, strict=True) if n > 1
        ]
        assert bool(rows[..., hq * d :].isnan().all())
        check_bits({"o": o.detach(), "lse": lse.detach()} | problem.backward((o, lse)), expected)
        assert torch.equal(out, expected["o"])
        with torch.no_grad(), pyft.backend("reference"):
            again = problem.forward(out=out.fill_(torch.nan))[0]
        assert again.data_ptr() == out.data_ptr()
        assert torch.equal(again, problem.by_reference()["o"])


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_the_tail_of_rows_is_written_after_o(name: str) -> None:
    """As S of the linear that reads [x | S]: o is as it was, and so are its gradients."""
    problem = make(**SMALL)
    expected = problem.run()
    b, hq, s, d = *problem.q.shape[:3], problem.v.shape[3]
    rows = torch.full((b, s, hq * d + 5), torch.nan)
    out = rows[..., : hq * d].unflatten(-1, (hq, d)).transpose(1, 2)
    with pyft.backend(name):
        o, lse = problem.forward(out=out)
    with torch.no_grad():
        rows[..., hq * d :] = 1.0
    found = problem.backward((o, lse))
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key])


@DTYPE
def test_gradients_into_one_buffer(dtype: torch.dtype) -> None:
    for case in CALLS:
        problem = make(dtype=dtype, dims=(8, 8), lengths=(9, 9), arriving="both", **CALLS[case])
        b, hq, s, d = problem.q.shape
        expected = problem.run()
        rows = torch.full((b, s, 2 * hq * d + 3), torch.nan, dtype=dtype)
        sizes = [hq * d, hq // 2 * d, hq // 2 * d]
        parts = rows[..., 3:].split(sizes, dim=-1)
        buffers = [x.unflatten(-1, (-1, d)).transpose(1, 2) for x in parts]
        outputs = problem.forward(gradients=buffers)
        assert bool(rows.isnan().all())
        found = problem.backward(outputs)
        check_bits({"o": outputs[0], "lse": outputs[1]} | found, expected)
        for name, buffer in zip(("dq", "dk", "dv"), buffers, strict=True):
            assert found[name].data_ptr() == buffer.data_ptr()
            assert torch.equal(buffer, expected[name])
        assert bool(rows[..., :3].isnan().all())


def test_buffers_under_checkpointing() -> None:
    problem = make(**SMALL)
    expected = problem.run()
    out = torch.full_like(expected["o"], torch.nan)
    buffers = [torch.full_like(expected[f"d{n}"], torch.nan) for n in "qkv"]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return pyft.attention(q, k, v, **problem.options, out=out, gradients=buffers)

    for reentrant in (True, False):
        for x in (out, *buffers):
            x.fill_(torch.nan)
        o = checkpoint(run, problem.q, problem.k, problem.v, use_reentrant=reentrant)
        for leaf in problem.leaves().values():
            leaf.grad = None
        o.backward(problem.do)
        for name, leaf in problem.leaves().items():
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected[f"d{name}"])


# Memory.


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_8_bytes_a_row(packed: bool) -> None:
    s, hq, hkv, d = 4096, 4, 1, 16
    q, k, v = (torch.randn(1, h, s, d).bfloat16().requires_grad_() for h in (hq, hkv, hkv))
    do = torch.randn(1, s, hq, d).bfloat16().transpose(1, 2)
    cu = torch.tensor([0, 1000, 1000, 1900, 4096], dtype=torch.int32) if packed else None

    def both(sinks: Tensor | None) -> Any:
        o = pyft.attention(q, k, v, cu_seqlens_q=cu, sinks=sinks)
        return o, torch.autograd.grad(o, [q, k, v, *([] if sinks is None else [sinks])], do)

    for sinks in (None, torch.randn(hq).requires_grad_()):
        o, found = both(sinks)
        given = sum(x.nbytes for x in (o, *found))
        assert peak_bytes(partial(both, sinks), CPU) - given <= 8 * hq * s + 4096


# torch.compile.


@pytest.mark.parametrize("packed", [False, True])
def test_new_lengths_do_not_compile_again(packed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None) -> Any:
        return pyft.attention(q, k, v, cu_seqlens_q=cu, window=20)

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    whole = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for s in (17, 33, 64, 129):
        q, k, v = (torch.randn(1, h, s, 16, requires_grad=True) for h in (4, 2, 2))
        cu = torch.tensor([0, s // 3, s], dtype=torch.int32) if packed else None
        results = []
        for function in (run, compiled, whole):
            o = function(q, k, v, cu)
            results.append([o, *torch.autograd.grad(o.square().sum(), [q, k, v])])
        for result in results[1:]:
            for x, wanted in zip(result, results[0], strict=True):
                torch.testing.assert_close(x, wanted)
    assert counter.frame_count == 1


def test_compiled_into_a_buffer() -> None:
    problem = make(**SMALL)
    expected, out = problem.run(), torch.full((2, 4, 7, 6), torch.nan)
    torch._dynamo.reset()
    compiled = torch.compile(pyft.attention, backend="aot_eager", fullgraph=True)
    found = problem.run(compiled, out=out)
    assert torch.equal(out, expected["o"])
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])
