"""scaled_dot_product_attention in torch's place."""

from typing import Any

import pytest
import torch
from attention_truth import largest
from shapes import QUANTIZED_DTYPES
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import pyft


def sdpa_cases() -> list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((7, 8), (9, 8)), ((3, 7, 8), (3, 9, 8)), ((2, 3, 7, 8), (2, 3, 9, 8)),
        ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8)), ((2, 3, 9, 8), (2, 3, 7, 8)),
        ((2, 3, 1, 8), (2, 3, 9, 8)),
    ]  # fmt: skip
    found: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = []
    for q, k in shapes:
        found += [(q, k, {}), (q, k, {"is_causal": True}), (q, k, {"scale": 0.3})]
        full = (*q[:-1], k[-2])
        for i in range(1, len(full) - 1):
            found.append((q, k, {"mask": full[i:]}))
        for i in range(len(full)):
            found.append((q, k, {"mask": (*full[:i], 1, *full[i + 1 :])}))
        found += [(q, k, {"mask": full}), (q, k, {"mask": (1,) * len(full)})]
    found.append(((2, 6, 7, 8), (2, 2, 9, 8), {"enable_gqa": True}))
    found.append(((2, 6, 7, 8), (2, 1, 9, 8), {"enable_gqa": True, "is_causal": True}))
    found.append(((2, 2, 4, 7, 8), (2, 2, 2, 9, 8), {"enable_gqa": True, "mask": (2, 2, 4, 7, 9)}))
    found.append(((4, 7, 8), (2, 9, 8), {"enable_gqa": True}))
    return found


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_scaled_dot_product_attention(kind: str) -> None:
    for q_shape, k_shape, given in sdpa_cases():
        options = dict(given)
        q, k, v = (
            torch.randn(shape, requires_grad=True)
            for shape in (q_shape, k_shape, (*k_shape[:-1], 5))
        )
        leaves = [q, k, v]
        if "mask" in options:
            shape = options.pop("mask")
            if kind == "bool":
                mask = torch.rand(shape) < 0.7
                mask[..., 0] = True  # of rows that see nothing, torch's are another matter
            else:
                mask = torch.randn(shape, requires_grad=True)
                leaves.append(mask)
            options["attn_mask"] = mask
        gqa = options.get("enable_gqa", False)
        results = []
        for function in (pyft.scaled_dot_product_attention, torch_sdpa):
            if function is torch_sdpa and gqa:
                group = q.shape[-3] // k.shape[-3]
                keys, values = (x.repeat_interleave(group, dim=-3) for x in (k, v))
                o = function(q, keys, values, **{**options, "enable_gqa": False})
            else:
                o = function(q, k, v, **options)
            torch.manual_seed(0)
            results.append([o, *torch.autograd.grad(o, leaves, torch.randn(o.shape))])
        for name, x, wanted in zip(("o", "dq", "dk", "dv", "dmask"), *results, strict=False):
            torch.testing.assert_close(
                x, wanted, msg=lambda m, n=name, at=(q_shape, k_shape, given): f"{n} {at}: {m}"
            )


def test_scaled_dot_product_attention_of_dtypes_and_devices_of_masks() -> None:
    for dtype in QUANTIZED_DTYPES:
        q, k, v = (torch.randn(2, 3, 7, 8).to(dtype) for _ in range(3))
        mask = torch.randn(7, 7).to(dtype)
        found = pyft.scaled_dot_product_attention(q, k, v, mask)
        wanted = torch_sdpa(q.double(), k.double(), v.double(), mask.double())
        assert found.dtype == dtype
        assert largest(found.double() - wanted) <= 4 * torch.finfo(dtype).eps * largest(wanted)
        nothing = torch.zeros(7, 7, dtype=torch.bool)
        assert not pyft.scaled_dot_product_attention(q, k, v, nothing).any()


def test_dropout_of_scaled_dot_product_attention() -> None:
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8)
    v = torch.eye(9).expand(2, 3, 9, 9)
    runs = []
    for state in (1, 1, 2):
        torch.manual_seed(state)
        runs.append(pyft.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    plain = torch_sdpa(q, k, v)
    torch.testing.assert_close(runs[0], torch.where(runs[0] == 0, 0.0, 2 * plain))
    assert 0.3 < (runs[0] == 0).float().mean() < 0.7
