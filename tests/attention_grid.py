"""The cases that every implementation of attention is held to: chosen ones, and a grid in which
each two values of two features meet.
"""

import random
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from stored_weights import DTYPES


@dataclass(frozen=True)
class Attention:
    """``seq``: queries and keys of each row of the batch; or ``lengths``: of each packed sequence.

    bias: its dimensions that are not broadcast, of "bhqk"; with ``masks`` a third of it is
    -infinity. layout: the order of dimensions in memory, or "qkv": heads of q, k and v side by
    side. Rows lie ``gap`` further apart than they need be and start ``misaligned`` elements late.
    dlse: none, "full", or "one" number of stride 0. content: "large" scores, or packed sequences
    of which the first is "alien": all NaN, which the others must not see. grads: those asked for.
    """

    seq: tuple[int, int] = (37, 37)
    lengths: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: str = "fp32"
    left: int | None = None
    right: int | None = None
    shift: int = 0
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: str = ""
    bias_dtype: str = ""  # as dtype
    masks: bool = False
    slopes: bool = False
    dropout: float = 0.0
    layout: str = "bhsd"
    gap: int = 0
    misaligned: int = 0
    dlse: str = ""
    grads: str = "qkv"
    content: str = "normal"
    repeat: bool = False  # twice the same bits

    @property
    def needs(self) -> set[str]:
        """What a kernel that runs this must know."""
        there = {
            "bias": self.bias != "",
            "slopes": self.slopes,
            "dropout": self.dropout > 0,
            self.dtype: True,
            "packed": self.lengths != (),
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "dim>128": max(self.dims) > 128,
            "dim>256": max(self.dims) > 256,
        }
        return {name for name, needed in there.items() if needed}

    @property
    def sizes(self) -> tuple[int, int]:
        """Sq and Sk of the tensors."""
        if not self.lengths:
            return self.seq
        return sum(q for q, _ in self.lengths), sum(k for _, k in self.lengths)


MIXED = ((17, 17), (0, 5), (9, 36), (1, 1), (14, 0), (0, 0), (30, 9))
EQUAL = tuple((n, n) for n in (3, 40, 1, 16, 0))

CAUSAL = {"right": 0}
VISIBLE: tuple[dict[str, Any], ...] = (
    {},
    CAUSAL,
    {"left": 6, "right": 0},
    {"left": 9, "right": 20},
    {"right": -3},
    {"left": 4, "right": 1, "shift": 11},
)
LENGTHS: tuple[dict[str, Any], ...] = (
    {"seq": (20, 50)},
    {"seq": (50, 20)},
    {"seq": (40, 40), "batch": 2},
    {"lengths": MIXED},
    {"lengths": EQUAL},
)
HEADS: tuple[dict[str, Any], ...] = tuple({"heads": h} for h in ((1, 1), (2, 1), (4, 2)))
DIMS: tuple[dict[str, Any], ...] = tuple(
    {"dims": d} for d in ((16, 16), (64, 64), (40, 40), (96, 32), (59, 111))
)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"layout": "bshd", "gap": 8},
    {"layout": "bhsd"},
    {"layout": "qkv"},
    {"layout": "bshd", "gap": 3, "misaligned": 1},
)
SCORES: tuple[dict[str, Any], ...] = ({}, {"softcap": 1.5}, {"sinks": True}, {"scale": 0.7})
LSE_GRADIENTS: tuple[dict[str, Any], ...] = ({}, {"dlse": "full"}, {"dlse": "one"})
ADDED: tuple[dict[str, Any], ...] = (
    {"bias": "bhqk"},
    {"bias": "hqk", "masks": True},
    {"bias": "qk", "bias_dtype": "fp32"},
    {"bias": "bk", "masks": True},
    {"slopes": True, "dropout": 0.3},
    {"slopes": True},
    {"dropout": 0.2, "bias": "bhqk", "bias_dtype": "fp16"},
)
PLAIN = (VISIBLE, LENGTHS, HEADS, DIMS, LAYOUTS, SCORES, LSE_GRADIENTS)


def _sensible(case: Attention) -> bool:
    if case.lengths and case.bias:
        return False
    if case.bias and "k" not in case.bias and not case.dlse:
        return False  # what all keys share moves nothing but the lse
    same = all(q == k for q, k in case.lengths or (case.seq,))
    return case.layout != "qkv" or (same and case.dims[0] == case.dims[1])


def _pairwise(seed: int, *factors: tuple[dict[str, Any], ...]) -> list[Attention]:
    """Cases in which each two values of two factors that go together meet at least once."""
    chooser = random.Random(seed)
    sizes = [range(len(factor)) for factor in factors]

    def made(choice: dict[int, int]) -> Attention:
        return Attention(**{k: v for f, i in choice.items() for k, v in factors[f][i].items()})

    pairs = [
        ((f, i), (g, j))
        for f, g in combinations(range(len(factors)), 2)
        for i in sizes[f]
        for j in sizes[g]
    ]
    missing, cases = set(pairs), []
    for pair in pairs:
        best: tuple[int, set[Any], Attention] | None = None
        for _ in range(200 if pair in missing else 0):
            choice = {f: chooser.choice(size) for f, size in enumerate(sizes)} | dict(pair)
            case = made(choice)
            if _sensible(case):
                met = set(combinations(sorted(choice.items()), 2))
                if best is None or len(met & missing) > best[0]:
                    best = len(met & missing), met, case
        if best is not None:
            missing -= best[1]
            cases.append(best[2])
    return cases


_DTYPED = tuple({"dtype": dtype} for dtype in DTYPES)
_HALF = tuple({"dtype": dtype} for dtype in ("bf16", "fp16"))

_SINGLE = [
    # head dims, equal and not, odd ones too
    *(
        Attention(dims=dims, dtype=dtype, **CAUSAL)
        for dims, dtypes in (
            ((1, 1), ("fp32", "bf16")),
            ((2, 3), ("fp16",)),
            ((32, 32), ("bf16",)),
            ((80, 80), ("fp16", "fp32")),
            ((111, 59), ("bf16",)),
            ((192, 128), ("fp16", "bf16")),
            ((256, 256), tuple(DTYPES)),
        )
        for dtype in dtypes
    ),
    *(Attention(seq=(33, 40), dims=(512, 512), dtype=d, **CAUSAL) for d in ("fp32", "bf16")),
    Attention(seq=(20, 20), heads=(2, 1), dims=(300, 264), dtype="fp16", sinks=True),
    # many blocks: of keys, of queries, of both
    *(
        Attention(seq=seq, heads=(2, 1), dims=(64, 64), dtype=dtype, layout="bshd", **visible)
        for dtype in ("bf16", "fp16")
        for seq, visible in (
            ((300, 300), CAUSAL),
            ((130, 400), {"left": 100, "right": 0}),
            ((5, 700), {}),
            ((1, 257), CAUSAL),
            ((500, 9), {"right": 30}),
            ((260, 300), {"left": 0, "right": 0, "sinks": True}),
        )
    ),
    Attention(
        lengths=((200, 200), (1, 1), (63, 190), (129, 129)), heads=(2, 1), dims=(64, 64),
        dtype="bf16", layout="bshd", left=90, **CAUSAL,
    ),
    Attention(
        lengths=tuple((1 + i % 3, 2) for i in range(30)), heads=(1, 1), dtype="fp16", **CAUSAL
    ),
    Attention(lengths=((0, 4), (0, 0), (0, 3)), dims=(16, 8)),
    Attention(lengths=((4, 0), (0, 0), (3, 0)), dims=(16, 8), sinks=True),
    Attention(lengths=((7, 7),), dtype="bf16"),
    # bounds at the edges of blocks
    *(
        Attention(seq=(n, n), dtype="fp16", **bounds)
        for n, reach in ((70, 14), (100, 30), (190, 62))
        for bounds in (
            {"left": reach},
            {"right": reach},
            {"left": reach + 1, "right": 1},
            {"left": 1, "right": reach + 1},
        )
    ),
    # another sequence's numbers never matter, nor do those past the end
    *(
        Attention(lengths=lengths, heads=(2, 1), dtype=dtype, content="alien", **visible)
        for lengths in (((21, 21), (37, 37), (4, 9)), ((5, 5), (0, 0), (90, 90)))
        for dtype, visible in (("fp32", {}), ("bf16", CAUSAL), ("fp16", {"left": 3}))
    ),
    # scores whose exp overflows
    *(
        Attention(dtype=dtype, dims=(64, 64), content="large", **more)
        for dtype, more in (
            ("fp32", {}),
            ("fp32", {"softcap": 150.0}),
            ("bf16", {"right": 0, "sinks": True}),
            ("fp16", {}),
        )
    ),
    # rows that see nothing, first, last and all
    *(
        Attention(seq=seq, heads=(2, 2), dtype=dtype, dlse="full", **visible)
        for dtype in ("fp32", "bf16")
        for seq, visible in (
            ((40, 24), CAUSAL),
            ((24, 40), {"left": 2, "right": -1, "shift": 12}),
            ((20, 20), {"right": 0, "shift": -20}),
            ((20, 20), {"right": 0, "shift": -20, "sinks": True}),
            ((20, 20), {"left": 3, "shift": 60}),
        )
    ),
    Attention(bias="bhqk", masks=True, dtype="bf16", seq=(20, 2), dlse="full"),
    Attention(bias="hk", masks=True, heads=(4, 2), seq=(20, 3), batch=2, sinks=True),
    # one token; a key for itself has P = 1 but for the sink
    *(Attention(seq=(1, 1), heads=(3, 3), sinks=True, dtype=d, dlse="full") for d in DTYPES),
    *(Attention(seq=(1, 9), dtype=d, heads=(8, 2), batch=3, **CAUSAL) for d in DTYPES),
    Attention(scale=-0.3, seq=(9, 12)),
    Attention(scale=0.0, seq=(9, 12), dtype="bf16"),
    # empty
    *(Attention(seq=seq, batch=batch) for seq, batch in (((0, 9), 2), ((0, 0), 1), ((9, 9), 0))),
    Attention(seq=(9, 0), dlse="full"),
    Attention(seq=(9, 0), sinks=True, dtype="bf16"),
    Attention(seq=(9, 0), bias="bh"),
    # some of the gradients
    *(Attention(grads=grads, heads=(4, 2), **CAUSAL) for grads in ("q", "k", "v", "qv", "kv", "")),
    # dropout with a number of keys that is not a multiple of 4, and the same bits twice
    *(
        Attention(seq=(19, 30), heads=(6, 2), dims=(40, 24), dtype=d, dropout=0.5, repeat=True)
        for d in DTYPES
    ),
    Attention(lengths=MIXED, heads=(4, 1), dtype="bf16", dropout=0.1, repeat=True, **CAUSAL),
    Attention(seq=(40, 70), heads=(4, 1), batch=2, dtype="fp16", bias="k", softcap=2.0),
    *(
        Attention(
            seq=(30, 41), batch=2, heads=(4, 2), bias=bias, dtype="bf16", softcap=3.0, dlse="full",
            **CAUSAL,
        )
        for bias in ("b", "q", "hk", "bq", "bhk", "bhq", "bqk", "bh")
    ),
]  # fmt: skip

CASES: dict[str, Attention] = {
    "-".join(
        f"{field.name}={getattr(case, field.name)}".replace(" ", "")
        for field in fields(case)
        if getattr(case, field.name) != field.default
    )
    or "default": case
    for case in (
        *_SINGLE,
        *_pairwise(1, _HALF, *PLAIN),
        *_pairwise(2, _DTYPED, ADDED, *PLAIN),
    )
}
