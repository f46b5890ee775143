"""What the loss takes besides its gradients, traced on fake tensors: the same code, no kernels run.

    python benchmarks/loss_memory.py [--rows 8192] [--labels 256000] [--dim 2304] [--json FILE]

The peak of a forward and backward over what there was before, less the gradients it returns.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from layer_memory import Live
from torch._subclasses.fake_tensor import FakeTensorMode

import pyft
from pyft.ops import linear_cross_entropy, linear_logprobs, logits
from pyft.ops.shared import head, head_gradients, rows

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def extra_bytes(
    n: int, v: int, d: int, dtype: torch.dtype, trained: bool, device: str = "cpu", **options: Any
) -> int:
    """Of ``pyft.linear_cross_entropy`` of hidden [n, d] and a head [v, d], trained or frozen."""
    live = Live()
    with _real_code(), FakeTensorMode():
        hidden = torch.empty(n, d, dtype=dtype, device=device, requires_grad=True)
        weight = torch.empty(v, d, dtype=dtype, device=device, requires_grad=trained)
        labels = torch.empty(n, dtype=torch.int64, device=device)
        for given in (hidden, weight, labels):
            live.follow(given)
        before = live.now
        with live:
            pyft.linear_cross_entropy(hidden, weight, labels, **options).backward()
        gradients = [x.grad.nbytes for x in (hidden, weight) if x.grad is not None]
    assert len(gradients) == 1 + trained
    return live.peak - before - sum(gradients)


def _real_code() -> ExitStack:
    """The ops themselves instead of their fakes; all rows count, and kernels do nothing."""

    def all_count(call: head.Call) -> head.Counted:
        return head.Counted(None, call.labels.clone())

    def nothing(*arguments: object) -> None:
        pass

    kernels = SimpleNamespace(logit_statistics=nothing, logit_gradient=nothing)
    stack = ExitStack()
    stack.enter_context(patch("pyft.op.plain", lambda arguments: True))
    stack.enter_context(patch.object(rows, "large_empty", _empty))
    stack.enter_context(patch.object(logits, "launcher", lambda *_: kernels))
    for module in (head_gradients, linear_cross_entropy, linear_logprobs):
        stack.enter_context(patch.object(module, "counted", all_count))
    return stack


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def main() -> None:
    """Print the table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description="memory of the loss, traced")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--labels", type=int, default=256000)
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes, found = (options.rows, options.labels, options.dim), []
    for name, dtype in DTYPES.items():
        for trained in (False, True):
            extra = extra_bytes(*sizes, dtype, trained) / 2**20
            found.append({"dtype": name, "trained": trained, "mib": extra})
            kind = "trained" if trained else "frozen"
            print(f"{name} {kind:8s} gradients + {extra:6.1f} MiB")
    if options.json is not None:
        versions = {"torch": torch.__version__, "pyft": pyft.__version__}
        row = dict(zip(("rows", "labels", "dim"), sizes, strict=True))
        text = json.dumps({**row, "versions": versions, "found": found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
