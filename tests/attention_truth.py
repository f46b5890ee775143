"""Attention from its definition, a head at a time in float64 numpy, gradients by formula: a truth
that shares nothing with the library. And calls of ``pyft.attention`` to hold against it.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from error_rule import check_error
from numpy.typing import NDArray
from test_dropout import words
from torch import Tensor

import pyft

Array = NDArray[np.float64]
Found = dict[str, Tensor]
SEED = 2**40 + 12345
ROUNDINGS = 4


@dataclass
class Problem:
    """One call: its tensors, what arrives at its outputs, and ``pyft.attention``'s other arguments
    by name. ``do`` None: o is not used; ``dlse`` None: lse is not used.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor | None
    dlse: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        """Whatever may get a gradient."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        more = {name: self.options.get(name) for name in ("sinks", "bias")}
        return named | {name: tensor for name, tensor in more.items() if tensor is not None}

    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.inputs().items() if x.requires_grad}

    def forward(self, function: Callable[..., Any] = pyft.attention, **more: Any) -> Any:
        """o and lse."""
        return function(self.q, self.k, self.v, return_lse=True, **self.options, **more)

    def backward(self, outputs: Sequence[Tensor], retain_graph: bool = False) -> Found:
        arriving = [(y, dy) for y, dy in zip(outputs, (self.do, self.dlse), strict=True)]
        used = [(y, dy) for y, dy in arriving if dy is not None and y.requires_grad]
        leaves = self.leaves()
        if not used or not leaves:
            return {}
        ys, dys = zip(*used, strict=True)
        found = torch.autograd.grad(
            ys, list(leaves.values()), dys, retain_graph, allow_unused=True, materialize_grads=True
        )
        return {f"d{name}": x for name, x in zip(leaves, found, strict=True)}

    def run(self, function: Callable[..., Any] = pyft.attention, **more: Any) -> Found:
        """o, lse and the gradients of all leaves."""
        o, lse = self.forward(function, **more)
        return {"o": o.detach(), "lse": lse.detach()} | self.backward((o, lse))

    def by_reference(self, dtype: torch.dtype | None = None) -> Found:
        """The same by the reference, in another dtype if one is given."""
        with pyft.backend("reference"):
            return (self if dtype is None else self.to(dtype)).run()

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().to(dtype).requires_grad_(x.requires_grad)

        wide = dtype if dtype == torch.float64 else torch.float32
        dlse = None if self.dlse is None else self.dlse.to(wide)
        options = {name: cast(x) for name, x in self.options.items()}
        q, k, v, do = map(cast, (self.q, self.k, self.v, self.do))
        return replace(self, q=q, k=k, v=v, do=do, dlse=dlse, options=options)

    def truth(self) -> "Truth":
        """What ``run`` should find."""
        results, sizes, growth = _truth(self)
        wanted = {"o", "lse"}
        if self.do is not None or self.dlse is not None:
            wanted |= {f"d{name}" for name in self.leaves()}
        return Truth(
            {n: results[n] for n in wanted}, {n: sizes[n] for n in wanted}, self.q.dtype, growth
        )


def sees(
    p: int, j: int, causal: bool = True, window: int | tuple[int | None, int | None] | None = None
) -> bool:
    """Whether a query at place p sees key j of its sequence."""
    if causal and j > p:
        return False
    if window is None:
        return True
    if isinstance(window, int):
        return p - window < j < p + window
    left, right = window
    return (left is None or j >= p - left) and (right is None or j <= p + right)


@dataclass
class Truth:
    """All results in float64; how large each would be if nothing cancelled; the dtype they come in,
    o at least, of which gradients are made; the largest score, whose rounding is in all shares.
    """

    found: Found
    sizes: Found
    dtype: torch.dtype
    growth: float


@dataclass
class Pairs:
    """Of queries [Sq] and keys [Sk]: [Sq, Sk] whether one sees the other, how far behind it the
    key is, and the key's place in its sequence.
    """

    seen: NDArray[np.bool_]
    behind: NDArray[np.int64]
    place: NDArray[np.int64]


def pairs_of(sq: int, sk: int, options: Mapping[str, Any]) -> Pairs:
    """Of one call, given its options."""
    cu_q, cu_k = (options.get(f"cu_seqlens_{what}") for what in "qk")
    ends_q = (0, sq) if cu_q is None else tuple(cu_q.tolist())
    ends_k = (0, sk) if cu_q is None else tuple((cu_q if cu_k is None else cu_k).tolist())
    rule = (options.get("causal", True), options.get("window"))
    return _pairs_of(ends_q, ends_k, options.get("shift", 0), *rule)


@cache
def _pairs_of(
    ends_q: tuple[int, ...], ends_k: tuple[int, ...], shift: int, causal: bool, window: Any
) -> Pairs:
    """Query by query and key by key."""
    sizes = ends_q[-1], ends_k[-1]
    found = Pairs(*(np.zeros(sizes, kind) for kind in (np.bool_, np.int64, np.int64)))
    for s in range(len(ends_q) - 1):
        queries, keys = ends_q[s + 1] - ends_q[s], ends_k[s + 1] - ends_k[s]
        for i in range(queries):
            p = i + keys - queries + shift
            for j in range(keys):
                at = ends_q[s] + i, ends_k[s] + j
                found.seen[at], found.behind[at] = sees(p, j, causal, window), p - j
                found.place[at] = j
    return found


def kept_pairs(
    b: int, hq: int, sq: int, sk: int, p: float, seed: int, place: NDArray[np.int64]
) -> Array:
    """[B, Hq, Sq, Sk]: 1 / (1 - p) where dropout leaves a pair in."""
    pitch = -(-sk // 4) * 4
    drawn = words(b * hq * sq * pitch, seed % 2**64).reshape(b, hq, sq, pitch)
    chosen = np.take_along_axis(drawn, np.broadcast_to(place, (b, hq, sq, sk)), axis=3)
    return (chosen >= np.uint64(int(p * 2**32))) / (1 - p)


def _numbers(x: Tensor | None) -> Any:
    return None if x is None else x.detach().double().numpy()


def _truth(problem: Problem) -> tuple[Found, Found, float]:
    options = problem.options
    q, k, v, do, dlse = map(_numbers, (problem.q, problem.k, problem.v, problem.do, problem.dlse))
    sinks, bias, slopes = (_numbers(options.get(n)) for n in ("sinks", "bias", "alibi_slopes"))
    (b, hq, sq, d), (hkv, sk), dv = q.shape, k.shape[1:3], v.shape[3]
    scale = options.get("scale")
    scale = d**-0.5 if scale is None else scale
    softcap, p = options.get("softcap"), options.get("dropout_p", 0.0)
    pairs = pairs_of(sq, sk, options)
    kept = np.ones((b, hq, sq, sk))
    if p > 0 and kept.size:
        kept = kept_pairs(b, hq, sq, sk, p, int(options["seed"]), pairs.place)
    do = np.zeros((b, hq, sq, dv)) if do is None else do
    dlse = np.zeros((b, hq, sq)) if dlse is None else dlse
    added = np.zeros((b, hq, sq, sk)) if bias is None else np.broadcast_to(bias, (b, hq, sq, sk))
    results, sizes = (
        {
            "o": np.zeros((b, hq, sq, dv)), "lse": np.zeros((b, hq, sq)), "dq": np.zeros(q.shape),
            "dk": np.zeros(k.shape), "dv": np.zeros(v.shape), "dsinks": np.zeros(hq),
            "dbias": np.zeros((b, hq, sq, sk)),
        }
        for _ in range(2)
    )  # fmt: skip
    growth = 1.0
    for row in range(b):
        for h in range(hq):
            kv, at = h // (hq // hkv), (row, h)
            slope = 0.0 if slopes is None else np.broadcast_to(slopes, (b, hq))[at]
            product = scale * (q[at] @ k[row, kv].T)
            bent = product if softcap is None else softcap * np.tanh(product / softcap)
            score = np.where(pairs.seen, bent + added[at] - slope * np.abs(pairs.behind), -np.inf)
            score = np.concatenate([score, np.full((sq, 1), -np.inf)], axis=1)
            if sinks is not None:
                score[:, sk] = sinks[h]
            top = score.max(axis=1, keepdims=True)
            top[top == -np.inf] = 0
            weight = np.exp(score - top)
            total = weight.sum(axis=1, keepdims=True)
            with np.errstate(divide="ignore"):
                lse = (np.log(total) + top)[:, 0]
            share = weight / np.where(total == 0, 1, total)
            seen, dropped = share[:, :sk], share[:, :sk] * kept[at]
            dp = (do[at] @ v[row, kv].T) * kept[at]
            mean = (seen * dp).sum(axis=1, keepdims=True)
            ds = seen * (dp - mean + dlse[at][:, None])
            slack = (1 - (bent / softcap) ** 2) if softcap is not None else 1.0
            dproduct = ds * slack * scale
            results["o"][at], results["lse"][at] = dropped @ v[row, kv], lse
            results["dq"][at] = dproduct @ k[row, kv]
            results["dk"][row, kv] += dproduct.T @ q[at]
            results["dv"][row, kv] += dropped.T @ do[at]
            results["dsinks"][h] += (share[:, sk:] * (dlse[at][:, None] - mean)).sum()
            results["dbias"][at] = ds

            aq, ak, av, ado = (np.abs(x) for x in (q[at], k[row, kv], v[row, kv], do[at]))
            adp = (ado @ av.T) * kept[at]
            amean = (seen * adp).sum(axis=1, keepdims=True) + np.abs(dlse[at])[:, None]
            ads = seen * (adp + amean)
            sizes["o"][at], sizes["lse"][at] = dropped @ av, 1 + _finite(lse)
            sizes["dq"][at] = abs(scale) * ads @ ak
            sizes["dk"][row, kv] += abs(scale) * ads.T @ aq
            sizes["dv"][row, kv] += dropped.T @ ado
            sizes["dsinks"][h] += (share[:, sk:] * amean).sum()
            sizes["dbias"][at] = ads
            score_size = (
                abs(scale) * (aq @ ak.T) + _finite(added[at]) + np.abs(slope * pairs.behind)
            )
            growth = max(growth, float(score_size.max(initial=0)))
    for found in (results, sizes):
        if bias is None:
            del found["dbias"]
        else:
            shape = (1,) * (4 - bias.ndim) + bias.shape
            at_one = tuple(i for i in range(4) if shape[i] == 1)
            summed = found["dbias"].sum(axis=at_one, keepdims=True)
            found["dbias"] = summed.reshape(bias.shape)
    found, size = (
        {name: torch.from_numpy(np.array(x)) for name, x in of.items()} for of in (results, sizes)
    )
    return found, size, growth


def _finite(x: Array) -> Array:
    return np.where(np.isfinite(x), np.abs(x), 0.0)


def check_rule(problems: Sequence[Problem], cancelling: Collection[str] = ()) -> None:
    """The error rule over several draws of one problem: one number alone may be right by chance.
    ``cancelling``: what is held to ``check_close`` instead.
    """
    found = [problem.run() for problem in problems]
    reference = [problem.by_reference() for problem in problems]
    truth = [problem.truth() for problem in problems]
    assert found[0].keys() == reference[0].keys() == truth[0].found.keys()
    for x, t in zip(found, truth, strict=True):
        check_close(x, t, only=cancelling)
    for name in truth[0].found.keys() - set(cancelling):
        nothing = [t.found[name] == -torch.inf for t in truth]
        check_error(
            name,
            *(
                torch.stack([_without(x[name], n, name) for x, n in zip(xs, nothing, strict=True)])
                for xs in (found, reference, [t.found for t in truth])
            ),
        )


def check_close(found: Found, truth: Truth, only: Collection[str] | None = None) -> None:
    """Within a few roundings of what each quantity would be if nothing cancelled, and of scores in
    at least fp32: for float64, and where the reference has no error to compare with.
    """
    assert found.keys() == truth.found.keys()
    for name in found.keys() if only is None else only:
        value, right = found[name], truth.found[name]
        assert value.shape == right.shape, name
        nothing = right == -torch.inf
        finite = _without(value, nothing, name).double()
        assert finite.isfinite().all(), name
        wide = torch.promote_types(truth.dtype, torch.float32)
        eps = torch.finfo(value.dtype).eps
        if name != "lse":
            eps = max(eps, torch.finfo(truth.dtype).eps)
        eps += truth.growth * torch.finfo(wide).eps
        error = largest(finite - _without(right, nothing, name))
        allowed = ROUNDINGS * eps * largest(truth.sizes[name])
        allowed += torch.finfo(value.dtype).smallest_normal
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def _without(x: Tensor, nothing: Tensor, name: str) -> Tensor:
    """-infinity where it should be and nowhere else; 0 there."""
    assert torch.equal(x == -torch.inf, nothing), name
    return x.masked_fill(nothing, 0.0)


def check_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def pairwise(
    features: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool], seed: int
) -> list[dict[str, Any]]:
    """Rows of one value of each feature, in which every allowed pair of values meets."""
    draw, names = random.Random(seed), list(features)

    def values(row: Mapping[str, int]) -> dict[str, Any]:
        return {name: features[name][at] for name, at in row.items()}

    todo = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x in range(len(features[a]))
        for y in range(len(features[b]))
        if allowed(values({a: x, b: y}))
    }
    rows = []
    while todo:
        row: dict[str, int] = dict(draw.choice(sorted(todo)))
        for name in draw.sample(names, len(names)):
            if name not in row:
                options = range(len(features[name]))
                able = [x for x in options if allowed(values({**row, name: x}))]
                draw.shuffle(able)
                row[name] = max(able, key=lambda x: len(todo & _pairs(names, row, name, x)))
        rows.append(values(row))
        todo -= {pair for name in names for pair in _pairs(names, row, name, row[name])}
    return rows


def _pairs(names: list[str], row: Mapping[str, int], name: str, x: int) -> set[Any]:
    """Of a row that gets this value: the pairs it is in."""
    place = names.index(name)
    return {
        ((other, y), (name, x)) if names.index(other) < place else ((name, x), (other, y))
        for other, y in row.items()
        if other != name
    }
