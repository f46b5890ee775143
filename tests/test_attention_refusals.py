"""What attention, chunked attention and scaled_dot_product_attention refuse, in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_behaviours import (
    check_refused,
)
from torch import Tensor

import pyft
from pyft.errors import UsageError

Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
P = torch.ones(1, 4, 6, 8)


def packed(q: Any = (0, 2, 6), k: Any = None, **options: Any) -> Callable[[], Any]:
    cu_q, cu_k = (x if x is None or isinstance(x, Tensor) else torch.tensor(x) for x in (q, k))
    return lambda: pyft.attention(P, P, P, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


def plain(*qkv: Tensor, **options: Any) -> Callable[[], Any]:
    q, k, v = (*qkv, *(Q, K, K)[len(qkv) :])
    return lambda: pyft.attention(q, k, v, **options)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "q": (
        plain(Q[0]), r"attention: q is torch.float32 \(4, 3, 8\); pass floating \[B, Hq, Sq, D\]"
    ),
    "integers": (plain(Q.int(), K.int(), K.int()), r"attention: q is torch.int32"),
    "no dimensions": (plain(Q[..., :0], K[..., :0], K), r"has heads of no dimensions"),
    "k": (plain(Q, K[..., :7]), r"k \(2, 2, 5, 7\) does not fit q .*need \[2, Hkv, Sk, 8\]"),
    "batch of k": (plain(Q, K[:1], K[:1]), r"k \(1, 2, 5, 8\) does not fit q"),
    "k of 3": (plain(Q, K[0]), r"k \(2, 5, 8\) does not fit q"),
    "v": (plain(Q, K, K[:, :, :4]), r"v \(2, 2, 4, 8\) does not fit k .*need \[2, 2, 5, Dv\]"),
    "heads of v": (plain(Q, K, K[:, :1]), r"v \(2, 1, 5, 8\) does not fit k"),
    "no values": (plain(Q, K, K[..., :0]), r"v \(2, 2, 5, 0\) does not fit k"),
    "heads": (
        plain(Q, torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 8)),
        "attention: 4 query heads are no multiple of 3 key heads",
    ),
    "no key heads": (plain(Q, K[:, :0], K[:, :0]), "4 query heads are no multiple of 0 key heads"),
    "dtype of k": (plain(Q, K.half()), "q is torch.float32 and k is torch.float16; cast one"),
    "dtype of v": (plain(Q, K, K.double()), "q is torch.float32 and v is torch.float64; cast one"),
    "device": (plain(Q, K.to("meta"), K.to("meta")), "q is on cpu and k on meta; move one of them"),
    "device of v": (plain(Q, K, K.to("meta")), "q is on cpu and v on meta"),
    "window": (plain(window=0), "attention: window is 0; it counts the query's own key too"),
    "negative window": (plain(window=-3), "attention: window is -3"),
    "softcap": (plain(softcap=0.0), "softcap is 0.0; pass a positive number, or None"),
    "negative softcap": (plain(softcap=-1.0), "softcap is -1.0"),
    "dropout": (plain(dropout_p=1.0), r"attention: dropout probability 1.0 is outside \[0, 1\)"),
    "negative dropout": (plain(dropout_p=-0.1), "dropout probability -0.1"),
    "sinks": (plain(sinks=torch.ones(2)), r"sinks are torch.float32 \(2,\); need floating \[4\]"),
    "integer sinks": (plain(sinks=torch.ones(4).int()), r"sinks are torch.int32"),
    "device of sinks": (plain(sinks=torch.ones(4, device="meta")), "q is on cpu and sinks on meta"),
    "bias": (
        plain(bias=torch.ones(3, 4)),
        r"bias is torch.float32 \(3, 4\); need floating \(2, 4, 3, 5\), or 1 in place",
    ),
    "5 dimensions of bias": (plain(bias=torch.ones(1, 1, 1, 3, 5)), r"bias is .*\(1, 1, 1, 3, 5\)"),
    "mask": (
        plain(bias=torch.ones(3, 5).bool()), "bias is torch.bool .*turn a mask into 0 and -inf"
    ),
    "device of bias": (plain(bias=torch.ones(3, 5, device="meta")), "cpu and bias on meta"),
    "slopes": (
        plain(alibi_slopes=torch.ones(2)),
        r"alibi_slopes are torch.float32 \(2,\); need floating \[4\] or \[2, 4\]",
    ),
    "integer slopes": (plain(alibi_slopes=torch.ones(4).int()), "alibi_slopes are torch.int32"),
    "device of slopes": (plain(alibi_slopes=torch.ones(4, device="meta")), "alibi_slopes on meta"),
    "only keys": (packed(None, (0, 6)), "cu_seqlens_k without cu_seqlens_q; pass both"),
    "batch": (plain(cu_seqlens_q=torch.tensor([0, 3])), "cu_seqlens with a batch of 2"),
    "bias with cu_seqlens": (packed(bias=torch.ones(6, 6)), "bias with cu_seqlens"),
    "keys of other length": (
        lambda: pyft.attention(P, P[:, :, :5], P[:, :, :5], cu_seqlens_q=torch.tensor([0, 6])),
        "6 queries and 5 keys; pass cu_seqlens_k",
    ),
    "floating": (packed(torch.tensor([0.0, 6.0])), "cu_seqlens_q is torch.float32"),
    "two dimensions": (packed([[0, 6]]), r"cu_seqlens_q is torch.int64 \(1, 2\); need int32 \[n"),
    "no boundaries": (
        packed(torch.zeros(0, dtype=torch.int32)), r"cu_seqlens_q is torch.int32 \(0,"
    ),
    "device of boundaries": (
        packed(torch.zeros(2, dtype=torch.int32, device="meta")), "cu_seqlens_q on meta"
    ),
    "descending": (
        packed((0, 4, 2, 6)), r"cu_seqlens_q must ascend from 0 to 6; it is \[0, 4, 2, 6"
    ),
    "wrong start": (packed((1, 4, 6)), r"must ascend from 0 to 6; it is \[1, 4, 6\]"),
    "wrong end": (packed((0, 4, 7)), r"must ascend from 0 to 6; it is \[0, 4, 7\]"),
    "wrong end of keys": (packed((0, 6), (0, 5)), r"cu_seqlens_k must ascend from 0 to 6"),
    "many": (
        packed((0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5)), r"it is \[0, 1, 2, 3, ..., 3, 4, 5\]"
    ),
    "counts": (packed((0, 6), (0, 2, 6)), "cu_seqlens of 1 sequences of queries and 2 of keys"),
    "longest": (packed(max_seqlen_q=3), "max_seqlen_q is 3, but a sequence has 4"),
    "longest of keys": (packed(max_seqlen_k=3), "max_seqlen_k is 3, but a sequence has 4"),
    "out": (
        plain(out=torch.ones(2, 4, 3, 7)),
        r"out is torch.float32 \(2, 4, 3, 7\) .*need torch.float32 \(2, 4, 3, 8\), the last stride",
    ),
    "strides of out": (plain(out=torch.ones(2, 4, 8, 3).mT), r"out is .*\(96, 24, 1, 3\)"),
    "dtype of out": (plain(out=torch.ones(2, 4, 3, 8).half()), "out is torch.float16"),
    "device of out": (plain(out=torch.ones(2, 4, 3, 8, device="meta")), "cpu and out on meta"),
    "two gradients": (plain(gradients=[Q, K]), "2 gradients; pass buffers for q, k and v"),
    "dk": (plain(gradients=[Q, Q, K]), r"gradients\[1\] is torch.float32 \(2, 4, 3, 8\)"),
    "dv": (plain(gradients=[Q, K, K[..., :4]]), r"gradients\[2\] is torch.float32 \(2, 2, 5, 4\)"),
    "dtype of dq": (plain(gradients=[Q.half(), K, K]), r"gradients\[0\] is torch.float16"),
    "chunks": (lambda: pyft.chunked_attention(Q, K, K, 0), "chunk_size is 0; need at least 1"),
    "k of chunks": (lambda: pyft.chunked_attention(Q, K[..., :7], K, 4), "does not fit q"),
    "sdpa mask and causal": (
        lambda: pyft.scaled_dot_product_attention(Q, Q, Q, torch.ones(3, 3), is_causal=True),
        "pass attn_mask or is_causal=True, not both",
    ),
    "sdpa dimensions": (
        lambda: pyft.scaled_dot_product_attention(Q, Q[0], Q[0]),
        r"query \(2, 4, 3, 8\), key \(4, 3, 8\) .*need the same number of dimensions, at least 2",
    ),
    "sdpa heads": (
        lambda: pyft.scaled_dot_product_attention(Q, K, K),
        "4 query heads and 2 key heads; set enable_gqa=True",
    ),
    "sdpa mask": (
        lambda: pyft.scaled_dot_product_attention(Q, Q, Q, torch.ones(2, 3, 3)),
        "attention: bias is",
    ),
    "sdpa leading dimensions": (
        lambda: pyft.scaled_dot_product_attention(Q, *torch.ones(2, 3, 4, 3, 8)),
        "does not fit|leading dimensions",
    ),
    "sdpa dropout": (
        lambda: pyft.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0), "outside"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refusals(what: str) -> None:
    check_refused(*BAD[what])


def test_backends_that_are_not_here() -> None:
    for name in ("triton", "cuda"):
        with pyft.backend(name), pytest.raises(UsageError, match=f"'{name}' cannot run attention"):
            pyft.attention(Q, K, K)
    with (
        pyft.backend("cpu"),
        pytest.raises(UsageError, match=r"run attention in torch\.float64"),
    ):
        pyft.attention(Q.double(), K.double(), K.double())


def test_slopes_get_no_gradient_but_from_the_reference() -> None:
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(UsageError, match="alibi_slopes require a gradient, which they do not get"):
        pyft.attention(Q, K, K, alibi_slopes=slopes)
    with torch.no_grad():
        pyft.attention(Q, K, K, alibi_slopes=slopes)
    with pyft.backend("reference"):
        k, v = torch.randn(2, 2, 2, 5, 8)
        o = pyft.attention(torch.randn(2, 4, 3, 8), k, v, alibi_slopes=slopes)
    assert torch.autograd.grad(o.square().sum(), slopes)[0].abs().max() > 0
