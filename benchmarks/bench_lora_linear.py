"""LoRA linear forward and backward: against the frozen linear (the floor) and against PEFT's own
forward, in one run.
"""

import copy

import pytest
import torch
from timing import DEVICE, ratio, synchronised
from torch import nn

import pyft

peft = pytest.importorskip("peft")
CASES = [(512, 2048, 2048, 16), (2048, 4096, 4096, 16)]  # M, N, K, R


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["bf16", "nf4"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_forward_backward(benchmark, case, quant):
    m, n, k, r = case
    dtype = torch.bfloat16
    plain = nn.Linear(k, n, bias=False, dtype=dtype, device=DEVICE).requires_grad_(False)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], init_lora_weights=False)
    linear = nn.Linear(k, n, bias=False, dtype=dtype, device=DEVICE)
    linear.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    if quant:
        linear.weight = nn.Parameter(pyft.quantize(plain.weight.detach()), requires_grad=False)
    layer = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    x = torch.randn(m, k, dtype=dtype, device=DEVICE, requires_grad=True)
    dy = torch.randn(m, n, dtype=dtype, device=DEVICE)
    adapter = [p for p in layer.parameters() if p.requires_grad]

    stock = copy.deepcopy(layer)
    stock_adapter = [p for p in stock.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *adapter], dy)

    def peft_step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(stock(x), [x, *stock_adapter], dy)

    expected = peft_step()
    pyft.apply(layer)
    for ours, theirs in zip(step(), expected, strict=True):
        assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    benchmark.extra_info["frozen"] = ratio(step, lambda: torch.autograd.grad(plain(x), x, dy), 5)
    benchmark.extra_info["peft"] = ratio(step, peft_step, 5)
    benchmark(synchronised(step))
