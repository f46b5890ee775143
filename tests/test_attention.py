"""Attention against its definition in float64: the error rule wherever two features meet, what is
seen, dropout's pairs, scores beyond what exp can hold, rows that see nothing.
"""

import itertools
import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from attention_truth import (
    SEED,
    Problem,
    check_bits,
    check_close,
    check_rule,
    kept_pairs,
    largest,
    pairs_of,
    pairwise,
    sees,
)
from hypothesis import given
from hypothesis import strategies as st
from shapes import LINEAR_DTYPES, QUANTIZED_DTYPES, dtype_name
from test_dropout import philox
from torch import Tensor

import pyft

DTYPE = pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=dtype_name)

# Bias: a letter is a dimension's size, 1 is 1; "inf": some entries are -infinity, those of one row
# all; "wide": fp32 whatever q is.
FEATURES: dict[str, list[Any]] = {
    "dtype": [*LINEAR_DTYPES],
    "dims": [
        (1, 1), (8, 8), (32, 32), (40, 40), (59, 59), (64, 64), (80, 80), (96, 96), (111, 111),
        (128, 128), (192, 128), (256, 256), (512, 512), (64, 40), (8, 96), (59, 1),
    ],
    "lengths": [
        (33, 33), (1, 40), (40, 1), (17, 50), (50, 17), (71, 71), (64, 130), (0, 5), (5, 0), (1, 1),
    ],
    "heads": [(1, 1), (4, 2), (6, 1), (3, 3)],
    "batch": [1, 2, 0],
    "mask": [
        {}, {"causal": False}, {"window": 2}, {"window": 17}, {"causal": False, "window": 5},
        {"causal": False, "window": (4, 2)}, {"causal": False, "window": (None, 3)},
        {"causal": False, "window": (3, None)}, {"causal": False, "window": (-1, 4)},
        {"window": (5, -2)}, {"window": (20, 4)},
    ],
    "shift": [0, 3, -5],
    "softcap": [None, 0.5, 30.0],
    "sinks": [None, "own", "wide", "inf"],
    "bias": [
        None, "bhqk", "1h11 wide", "b11k inf", "11qk inf", "1hqk wide inf", "b1q1", "111k", "hqk",
        "qk wide", "1111",
    ],
    "slopes": [None, "h", "bh"],
    "packed": [None, "alike", torch.int32, torch.int64],
    "dropout": [0.0, 0.3],
    "scale": [None, 0.0, -0.6, 2.5],  # times the usual one
    "layout": ["heads", "projections", "together", "columns", "shared"],
    "arriving": ["o", "sum", "lse", "both", "both expanded"],
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "dims": (16, 16), "lengths": (33, 33), "heads": (4, 2), "batch": 2,
    "mask": {}, "shift": 0, "softcap": None, "sinks": None, "bias": None, "slopes": None,
    "packed": None, "dropout": 0.0, "scale": None, "layout": "heads", "arriving": "o",
}  # fmt: skip


def allowed(row: Mapping[str, Any]) -> bool:
    if row.get("packed") is not None:
        if row.get("batch", 1) != 1 or row.get("bias") is not None:
            return False
        if row["packed"] == "alike" and len(set(row.get("lengths", (1, 1)))) > 1:
            return False
    return True


def laid_out(layout: str, b: int, s: int, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """NaN [B, H, S, D] of each (H, D), in memory as named."""
    if layout == "together":
        whole = torch.full((b, s, sum(h * d for h, d in sizes) + 3), torch.nan)
        parts = whole[..., 3:].split([h * d for h, d in sizes], dim=-1)
        return [x.unflatten(-1, size).transpose(1, 2) for x, size in zip(parts, sizes, strict=True)]
    return [
        torch.full((b, s, h, d), torch.nan).transpose(1, 2)
        if layout == "projections"
        else torch.full((b, h, s, d, 2 if layout == "columns" else 1), torch.nan)[..., 0]
        for h, d in sizes
    ]


def tensors(
    layout: str, dtype: torch.dtype, b: int, sq: int, sk: int, hq: int, hkv: int, d: int, dv: int
) -> list[Tensor]:
    if layout == "shared":  # keys and values stored once for all rows and heads
        q = torch.randn(b, hq, sq, d).to(dtype)
        return [q, *(torch.randn(1, 1, sk, x).to(dtype).expand(b, hkv, sk, x) for x in (d, dv))]
    longest = max(sq, sk)
    views = laid_out(layout, b, longest, [(hq, d), (hkv, d), (hkv, dv)])
    storage: dict[int, Tensor] = {}
    found = []
    for view, s in zip(views, (sq, sk, sk), strict=True):
        base = view._base if view._base is not None else view
        cast = storage.setdefault(base.data_ptr(), base.to(dtype))
        part = cast.as_strided(view.shape, view.stride(), view.storage_offset())[:, :, :s]
        found.append(part.copy_(torch.randn(part.shape)))
    return found


def boundaries(draw: random.Random, n: int, length: int, dtype: torch.dtype) -> Tensor:
    """Of n sequences, some of them empty."""
    inner = sorted(draw.choice([0, length, draw.randint(0, length)]) for _ in range(n - 1))
    return torch.tensor([0, *inner, length], dtype=dtype)


def bias_of(kind: str, dtype: torch.dtype, sizes: dict[str, int]) -> Tensor:
    letters, *how = kind.split()
    shape = [1 if letter == "1" else sizes[letter] for letter in letters]
    bias = torch.randn(shape).to(
        torch.promote_types(dtype, torch.float32) if "wide" in how else dtype
    )
    if "inf" in how:
        bias[torch.rand(shape) < 0.2] = -torch.inf
        if letters[-2] == "q" and shape[-2]:
            bias[..., shape[-2] // 2, :] = -torch.inf
    return bias.requires_grad_()


def make(**changed: Any) -> Problem:
    """A problem with these features, and otherwise plain ones."""
    x = PLAIN | changed
    (d, dv), (sq, sk), (hq, hkv), b, dtype = (
        x[name] for name in ("dims", "lengths", "heads", "batch", "dtype")
    )
    wide = torch.promote_types(dtype, torch.float32)
    options: dict[str, Any] = dict(x["mask"])
    options |= {name: x[name] for name in ("shift", "softcap")}
    options["scale"] = None if x["scale"] is None else x["scale"] * d**-0.5
    if x["dropout"]:
        options |= {"dropout_p": x["dropout"], "seed": SEED}
    if x["sinks"] is not None:
        sinks = torch.randn(hq).to(dtype if x["sinks"] == "own" else wide)
        if x["sinks"] == "inf":
            sinks[0] = -torch.inf
        options["sinks"] = sinks.requires_grad_()
    if x["bias"] is not None:
        options["bias"] = bias_of(x["bias"], dtype, {"b": b, "h": hq, "q": sq, "k": sk})
    if x["slopes"] is not None:
        options["alibi_slopes"] = torch.rand(*((b, hq) if x["slopes"] == "bh" else (hq,))) - 0.2
    if x["packed"] is not None:
        draw = random.Random(sq * 1000 + sk)
        kind = torch.int32 if x["packed"] == "alike" else x["packed"]
        options["cu_seqlens_q"] = boundaries(draw, 5, sq, kind)
        if x["packed"] != "alike":
            options["cu_seqlens_k"] = boundaries(draw, 5, sk, kind)
    q, k, v = (t.requires_grad_() for t in tensors(x["layout"], dtype, b, sq, sk, hq, hkv, d, dv))
    do = torch.randn(b, sq, hq, dv).to(dtype).transpose(1, 2)
    dlse = torch.randn(b, hq, sq, dtype=wide)
    arriving: Any = {
        "o": (do.contiguous(), None),
        "sum": (torch.ones((), dtype=dtype).expand(b, hq, sq, dv), None),
        "lse": (None, dlse),
        "both": (do, dlse),
        "both expanded": (do[..., :1].expand_as(do), dlse[:1, :1, :1].sum().expand(b, hq, sq)),
    }[x["arriving"]]
    return Problem(q, k, v, *arriving, options)


NUMBERS = 36  # the fewest of a kind that are compared: one may be right by chance
GRID = pairwise(FEATURES, allowed, seed=5)


def test_the_grid_is_pairwise() -> None:
    for a, b in itertools.combinations(FEATURES, 2):
        met = {(repr(row[a]), repr(row[b])) for row in GRID}
        for x, y in itertools.product(FEATURES[a], FEATURES[b]):
            assert ((repr(x), repr(y)) in met) == allowed({a: x, b: y})


def cancelling(row: Mapping[str, Any], names: Collection[str]) -> Collection[str]:
    """What has no error in the reference to be compared with. With scale 0 its scores are exact.
    With one key, and in the gradient of a bias that all keys share, the sum of a row of dS counts:
    the reference takes do v and sum(p do v) from one rounding, kernels from those of do v and o.
    """
    if row["scale"] == 0 or row["lengths"][1] == 1:
        return names
    return {"dbias"} if (row["bias"] or "k").split()[0][-1] == "1" else ()


@pytest.mark.parametrize("row", range(len(GRID)))
def test_error_rule(row: int) -> None:
    features = GRID[row]
    problems = [make(**features)]
    truth = problems[0].truth()
    check_close(problems[0].by_reference(torch.float64), problems[0].to(torch.float64).truth())
    if features["dtype"] == torch.float64:
        check_close(problems[0].run(), truth)
        return
    names = cancelling(features, truth.found)
    counts = [x.numel() for name, x in truth.found.items() if name == "lse" or name not in names]
    more = max(2, NUMBERS // (min(counts) or NUMBERS)) - 1
    check_rule([*problems, *(make(**features) for _ in range(more))], names)


BROADCAST = ["".join(x) for x in itertools.product("b1", "h1", "q1", "k1")]


@pytest.mark.parametrize("inf", ["", " inf"])
@pytest.mark.parametrize("shape", BROADCAST)
def test_bias_of_every_shape(shape: str, inf: str) -> None:
    for dtype in LINEAR_DTYPES:
        problem = make(dtype=dtype, bias=shape + inf, sinks="own", lengths=(9, 21), arriving="both")
        check_close(problem.run(), problem.truth())


@pytest.mark.parametrize("other", LINEAR_DTYPES, ids=dtype_name)
@DTYPE
def test_dtypes_of_bias_sinks_and_slopes(dtype: torch.dtype, other: torch.dtype) -> None:
    """Any floating one, and any strides; their gradients are of it."""
    problem = make(dtype=dtype, lengths=(7, 9), dims=(8, 6), arriving="both")
    problem.options |= {
        "bias": torch.randn(9, 7, 4, 4).to(other).permute(3, 2, 1, 0)[::2].requires_grad_(),
        "sinks": torch.randn(8).to(other)[::2].requires_grad_(),
        "alibi_slopes": torch.rand(4, 2).to(other).T,
    }
    found = problem.run()
    check_close(found, problem.truth())
    assert found["dbias"].dtype == found["dsinks"].dtype == other


@pytest.mark.parametrize("shape", [s for s in BROADCAST if "1" in s])
def test_bias_expanded_by_the_caller(shape: str) -> None:
    """A view of stride 0 has as many gradients as it has entries, which torch sums."""
    problem = make(bias=shape, lengths=(9, 21), arriving="both")
    small = problem.options["bias"]
    expected = problem.run()["dbias"]
    problem.options["bias"] = small.expand(2, 4, 9, 21)
    (found,) = torch.autograd.grad(
        problem.forward(),
        [small],
        [problem.do, problem.dlse],  # type: ignore[list-item]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    problem.options["bias"] = small.detach().expand(2, 4, 9, 21).requires_grad_()
    check_close(problem.run(), problem.truth())


def seen_by(problem: Problem) -> Tensor:
    """[B, Hq, Sq, Sk]: the shares of keys, read off values that are unit vectors."""
    b, hkv, sk = problem.k.shape[:3]
    problem.v = torch.eye(sk, dtype=problem.q.dtype).expand(b, hkv, sk, sk)
    shares: Tensor = problem.forward()[0].detach()
    return shares


@pytest.mark.parametrize("causal", [True, False])
def test_which_keys_are_seen(causal: bool) -> None:
    """Every window and shift over lengths of up to 7: those and no others, all alike at scale 0."""
    bounds = [None, *range(-3, 5)]
    windows = [None, *range(1, 6), *itertools.product(bounds, bounds)]
    for sq, sk in ((1, 1), (1, 6), (6, 1), (4, 7), (7, 4), (5, 5)):
        for window, shift in itertools.product(windows, (0, 2, -3)):
            problem = make(
                lengths=(sq, sk), heads=(1, 1), batch=1, scale=0.0, shift=shift, dims=(2, 2),
                mask={"causal": causal, "window": window},
            )  # fmt: skip
            seen = pairs_of(sq, sk, problem.options).seen
            assert np.array_equal(seen_by(problem)[0, 0] > 0, seen), (sq, sk, window, shift)


def test_windows_by_their_definition() -> None:
    """The last W keys, p itself included; as many after it where later ones are seen."""
    for p, w in ((9, 1), (9, 4), (2, 4)):
        assert [j for j in range(20) if sees(p, j, True, w)] == [*range(max(0, p - w + 1), p + 1)]
        both = [*range(max(0, p - w + 1), p + w)]
        assert [j for j in range(20) if sees(p, j, False, w)] == both
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 9, 8)
    for w in (1, 4, 9):
        options = {"return_lse": True, "causal": False}
        found = pyft.attention(q, k, k, **options, window=w)
        wanted = pyft.attention(q, k, k, **options, window=(w - 1, w - 1))
        assert all(map(torch.equal, found, wanted))


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    group, hkv = (data.draw(st.integers(1, 3)) for _ in range(2))
    features = {name: data.draw(st.sampled_from(values)) for name, values in FEATURES.items()}
    features |= {
        "lengths": tuple(data.draw(st.integers(0, 80)) for _ in range(2)),
        "dims": tuple(data.draw(st.integers(1, 70)) for _ in range(2)),
        "heads": (group * hkv, hkv), "dtype": data.draw(st.sampled_from(QUANTIZED_DTYPES)),
    }  # fmt: skip
    if not allowed(features):
        features |= {"batch": 1, "bias": None, "packed": torch.int32}
    problem = make(**features)
    check_close(problem.run(), problem.truth())


NOTHING: dict[str, dict[str, Any]] = {
    "window": {"window": (0, -50)},
    "bias": {"bias": torch.full((1, 1, 1, 1), -torch.inf)},
    "packed": {"cu_seqlens_q": [0, 40, 40], "cu_seqlens_k": [0, 0, 9]},
    "shift": {"shift": -60},
}


@DTYPE
@pytest.mark.parametrize("sinks", [None, "own"])
@pytest.mark.parametrize("what", NOTHING)
def test_rows_that_see_nothing(what: str, sinks: str | None, dtype: torch.dtype) -> None:
    """o = 0, gradients 0, lse -infinity or the sink, which gets all of lse's gradient."""
    problem = make(
        dtype=dtype, batch=1 if what == "packed" else 2, lengths=(40, 9), sinks=sinks,
        arriving="both",
    )  # fmt: skip
    for name, value in NOTHING[what].items():
        problem.options[name] = torch.tensor(value) if isinstance(value, list) else value
    if what == "bias":
        problem.options["bias"].requires_grad_()
    found = problem.run()
    lse, dsinks = found.pop("lse"), found.pop("dsinks", None)
    assert all(not x.any() for x in found.values())
    if dsinks is None:
        assert bool((lse == -torch.inf).all())
    else:
        assert problem.dlse is not None
        assert torch.equal(lse, problem.options["sinks"].float()[:, None].expand_as(lse))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            dsinks.float(), problem.dlse.sum(dim=(0, 2)), rtol=eps, atol=40 * 1e-6
        )


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@DTYPE
def test_masks_of_the_least_number(dtype: torch.dtype, wide: bool, whole_row: bool) -> None:
    """As models build them. Of a row of nothing else no score shows: its output is no larger than
    the values, and other rows are as they should be.
    """
    problem = make(dtype=dtype, lengths=(9, 21), mask={"causal": False})
    kind = torch.float32 if wide else dtype
    bias = torch.zeros(1, 1, 9, 21, dtype=kind)
    bias[..., 15:] = torch.finfo(kind).min
    assert problem.do is not None
    if whole_row:
        bias[..., 4, :] = torch.finfo(kind).min
        problem.do[:, :, 4] = 0
    problem.options["bias"] = bias.requires_grad_()
    found, truth = problem.run(), problem.truth()
    truth.growth = 30.0
    if whole_row:
        assert largest(found["o"][:, :, 4]) <= largest(problem.v.detach())
        found["o"][:, :, 4], truth.found["o"][:, :, 4] = 0, 0
        found["lse"][:, :, 4], truth.found["lse"][:, :, 4] = 0, 0
        truth.sizes["lse"][:, :, 4] = 0
    check_close(found, truth)


def with_whole_numbers(problem: Problem, limit: int) -> Problem:
    """q and k in 2 dimensions: their products are exact. And small gradients arrive."""
    with torch.no_grad():
        for x in (problem.q, problem.k):
            x.zero_()[..., :2] = torch.randint(-limit, limit + 1, x[..., :2].shape).to(x.dtype)
    assert problem.do is not None
    problem.do = problem.do / 1024
    return problem


@DTYPE
@pytest.mark.parametrize("sink", [None, 0.0, 1e4])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_scores_beyond_exp(size: float, sink: float | None, dtype: torch.dtype) -> None:
    for causal in (True, False):
        problem = make(dtype=dtype, dims=(8, 24), mask={"causal": causal}, arriving="both")
        with_whole_numbers(problem, 8).options["scale"] = size / 128
        if sink is not None:
            problem.options["sinks"] = torch.full((4,), sink).requires_grad_()
        check_close(problem.run(), problem.truth())


@DTYPE
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_the_largest_values_of_fp16(d: int, dtype: torch.dtype) -> None:
    """q k is far beyond fp16; of the usual scale beyond what fp32 tells apart from lse, too: then
    shares of equal keys are all 1, but never more.
    """
    value = 60000 / d**0.5
    problem = make(dtype=dtype, dims=(d, 16), arriving="both", lengths=(9, 9))
    assert problem.do is not None
    problem.do = problem.do / 1024
    with torch.no_grad():
        problem.q.fill_(value)
        positive = torch.rand(problem.k.shape[:3]) < 0.5
        problem.k.copy_(torch.where(positive, value, -value)[..., None])
    problem.dlse = torch.zeros_like(problem.dlse)
    o, lse = problem.forward()
    gradients = problem.backward((o, lse))
    assert all(x.isfinite().all() for x in gradients.values())
    most = problem.do.abs().sum(dim=2, keepdim=True).unflatten(1, (2, 2)).sum(dim=2)
    assert bool((gradients["dv"].abs() <= 1.01 * most).all())
    truth = problem.truth()
    torch.testing.assert_close(lse.double(), truth.found["lse"], rtol=d * 2.0**-23, atol=0)
    truth.growth = 1.0
    check_close({"o": o.detach(), "lse": lse.detach()} | gradients, truth, only=["o"])
    problem.options["scale"] = 2**-20
    check_close(problem.run(), problem.truth())


@DTYPE
def test_other_sequences_do_not_matter(dtype: torch.dtype) -> None:
    """Not even where they hold infinities and NaN."""
    for poison in (torch.nan, torch.inf, -torch.inf):
        for dims in ((16, 16), (59, 40)):
            problem = make(dtype=dtype, lengths=(60, 70), batch=1, dims=dims, arriving="both")
            ends_q, ends_k = [0, 20, 37, 60], [0, 31, 40, 70]
            problem.options |= {
                "cu_seqlens_q": torch.tensor(ends_q), "cu_seqlens_k": torch.tensor(ends_k)
            }  # fmt: skip
            clean = problem.run()
            for s in range(3):
                queries, keys = (
                    torch.arange(e[-1]).ge(e[s]) & torch.arange(e[-1]).lt(e[s + 1])
                    for e in (ends_q, ends_k)
                )
                bad = Problem(
                    *(
                        x.detach().clone().masked_fill_(~at[:, None], poison).requires_grad_()
                        for x, at in ((problem.q, queries), (problem.k, keys), (problem.v, keys))
                    ),
                    problem.do.masked_fill(~queries[:, None], poison),  # type: ignore[union-attr]
                    problem.dlse.masked_fill(~queries, poison),  # type: ignore[union-attr]
                    problem.options,
                )
                for name, x in bad.run().items():
                    at = keys if name in ("dk", "dv") else queries
                    assert torch.equal(x[:, :, at], clean[name][:, :, at]), (name, s, poison)


@DTYPE
def test_packed_is_each_by_itself(dtype: torch.dtype) -> None:
    problem = make(dtype=dtype, lengths=(60, 70), batch=1, dims=(40, 24), arriving="both")
    ends_q, ends_k = [0, 20, 20, 37, 60], [0, 31, 40, 40, 70]
    problem.options |= {
        "cu_seqlens_q": torch.tensor(ends_q), "cu_seqlens_k": torch.tensor(ends_k), "window": 9
    }  # fmt: skip
    packed = problem.run()
    for s in range(4):
        queries, keys = (slice(e[s], e[s + 1]) for e in (ends_q, ends_k))
        assert problem.do is not None
        assert problem.dlse is not None
        alone = Problem(
            *(
                x.detach()[:, :, part].requires_grad_()
                for x, part in ((problem.q, queries), (problem.k, keys), (problem.v, keys))
            ),
            problem.do[:, :, queries], problem.dlse[:, :, queries], {"window": 9},
        )  # fmt: skip
        truth = alone.truth()
        parts = {n: x[:, :, keys if n in ("dk", "dv") else queries] for n, x in packed.items()}
        check_close(parts, truth)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 5, 2**64 - 3])
def test_pairs_that_dropout_leaves_out(seed: int, name: str) -> None:
    """Of every sequence those that its words name; what is kept is divided by 1 - p."""
    b, hq, sq, sk, p = 2, 4, 9, 13, 0.4
    for lengths in ([[0, 9], [0, 13]], [[0, 4, 4, 9], [0, 0, 6, 13]]):
        packed = len(lengths[0]) > 2
        problem = make(batch=1 if packed else b, lengths=(sq, sk), scale=0.0, dropout=p)
        problem.options |= {"seed": seed, "causal": False}
        if packed:
            problem.options |= {
                f"cu_seqlens_{what}": torch.tensor(e) for what, e in zip("qk", lengths, strict=True)
            }
        with pyft.backend(name):
            found = seen_by(problem)
        pairs = pairs_of(sq, sk, problem.options)
        kept = kept_pairs(1 if packed else b, hq, sq, sk, p, seed, pairs.place)
        share = pairs.seen / np.maximum(1, pairs.seen.sum(axis=1, keepdims=True))
        torch.testing.assert_close(found, torch.from_numpy(kept * share).float())


def test_dropout_beyond_32_bits_of_pairs() -> None:
    """Of 200 000 queries, word 4 10^10: its counter has a second word."""
    s, p, seed = 200_000, 0.5, 2**63 - 1
    q = torch.zeros(1, 1, s, 1)
    v = torch.stack([torch.arange(s) % 2, (torch.arange(s) + 1) % 2], dim=-1).float()[None, None]
    o = pyft.attention(q, q, v, window=2, dropout_p=p, seed=seed)
    for i in (1, 30_000, 150_001, s - 1):
        for j in (i - 1, i):
            index = i * s + j
            counter = [np.array([x], dtype=np.uint64) for x in (index // 4 % 2**32, index // 2**34)]
            zero = [np.zeros(1, dtype=np.uint64)] * 2
            word = int(philox(counter + zero, [seed % 2**32, seed // 2**32])[index % 4][0])
            assert o[0, 0, i, 1 - j % 2] == (word >= 2**31), (i, j)


@pytest.mark.unfilled
@DTYPE
def test_beyond_31_bits_of_elements(dtype: torch.dtype) -> None:
    """Heads 2^30 elements apart; memory in between is never touched."""
    near = make(dtype=dtype, heads=(3, 3), batch=1, arriving="both", sinks="own")
    expected = near.run()
    memory = torch.empty(2**31 + 2**16, dtype=dtype)
    start = 0

    def far(x: Tensor) -> Tensor:
        nonlocal start
        size = x.shape[2] * x.shape[3]
        strides = (0, 2**30, x.shape[3], 1)
        view = memory.as_strided(x.shape, strides, start)
        start += size + 64
        return view.copy_(x.detach())

    q, k, v, do = (far(x) for x in (near.q, near.k, near.v, near.do))  # type: ignore[arg-type]
    problem = Problem(*(x.requires_grad_() for x in (q, k, v)), do, near.dlse, near.options)
    out, *buffers = (far(torch.full_like(x, torch.nan)) for x in (do, q, k, v))
    check_bits(problem.run(out=out, gradients=buffers), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_rate_of_dropout(p: float) -> None:
    problem = make(lengths=(100, 100), scale=0.0, dropout=p, mask={"causal": False})
    kept = seen_by(problem) > 0
    n = kept.numel()
    assert abs(kept.sum() - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    for dim in (0, 1, 2, 3):  # no row, head or query as the one before it
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        agree = p**2 + (1 - p) ** 2
        assert abs((a == b).float().mean() - agree) < 6 * (agree * (1 - agree) / a.numel()) ** 0.5


def test_a_seed_drawn_from_torch() -> None:
    problem = make(dropout=0.5)
    problem.options["seed"] = None
    runs = []
    for state in (1, 1, 2):
        torch.manual_seed(state)
        runs.append(problem.run())
    check_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["o"], runs[2]["o"])
    problem.options["seed"] = torch.tensor(9)
    by_tensor = problem.run()
    problem.options["seed"] = 9
    check_bits(problem.run(), by_tensor)
    problem.options["dropout_p"] = 0.0
    nothing = problem.run()
    assert largest(nothing["o"] - by_tensor["o"]) > 0
    problem.options["seed"] = None
    before = torch.get_rng_state()
    check_bits(problem.run(), nothing)
    assert torch.equal(torch.get_rng_state(), before)


@DTYPE
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e4, -1e4, 1e-30])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    problem = make(dtype=dtype, dims=(16, 24), arriving="both")
    problem.options["scale"] = scale
    if abs(scale) > 1:
        assert problem.dlse is not None
        problem = with_whole_numbers(problem, 3)
        problem.dlse = problem.dlse / 1024
    check_close(problem.run(), problem.truth())
