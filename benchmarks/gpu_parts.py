"""Steps of `make gpu` that are neither tests nor `pyft bench`; each prints one JSON line last.

python benchmarks/gpu_parts.py environment            versions, device, which backends run
python benchmarks/gpu_parts.py memory                 measured peaks beside what is counted
python benchmarks/gpu_parts.py kernels [--few]        every kernel, for compute-sanitizer
python benchmarks/gpu_parts.py chart BENCH.json PNG   the chart of finished results
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernels
from torch import Tensor

import pyft
from pyft.backend import availability
from pyft.bench.memory import peak_bytes
from pyft.bench.report import describe, figure, strict
from pyft.optim import AdamW8bit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = {"cuda": (14336, 4096, 2048), "cpu": (1024, 512, 64)}  # N, K, M
HEADS = {"cuda": (32, 8, 16384, 128), "cpu": (4, 2, 1024, 64)}  # H, Hkv, S, D of attention
LOSSES = {"cuda": (8192, 256000, 2304), "cpu": (256, 4096, 64)}  # N, V, D
RANK = 16
QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"


def environment() -> dict[str, Any]:
    """The report's heading, the backends, and what nvidia-smi reads now."""
    found = describe(DEVICE, "make gpu") | {"availability": availability()}
    del found["results"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def memory() -> dict[str, Any]:
    """Peaks, as differences, of a linear's, an attention's and a loss's forward and backward and of
    an optimizer's step.

    ``counted`` is the least that must be held: of a linear what it returns and the adapter's
    products, of attention the output, the gradients and two fp32 sums a row, of a loss the
    gradients and the logits it works on, of a step the states.
    ``first`` is the first call, which also makes what later calls reuse: the buffer a quantized
    weight is decoded into, the states.
    """
    n, k, m = LAYERS[DEVICE.type]
    w = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) * k**-0.5
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    dy = torch.randn(m, n, dtype=torch.bfloat16, device=DEVICE)
    a = torch.randn(RANK, k, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    b = torch.randn(n, RANK, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    q = pyft.quantize(w)

    def linear(weight: Tensor, *adapter: Tensor) -> tuple[Tensor, ...]:
        y = pyft.lora_linear(x, weight, *(adapter or (None, None)))
        return torch.autograd.grad(y, [x, *adapter], dy)

    y_and_dx = dy.nbytes + x.nbytes
    adapter = 2 * m * RANK * 2 + a.nbytes + b.nbytes  # S, dS, dA, dB
    found: dict[str, Any] = {
        "linear, plain": _peaks(lambda: linear(w), y_and_dx),
        "linear, nf4": _peaks(lambda: linear(q), y_and_dx),
        "lora_linear, plain": _peaks(lambda: linear(w, a, b), y_and_dx + adapter),
        "lora_linear, nf4": _peaks(lambda: linear(q, a, b), y_and_dx + adapter),
    }
    h, hkv, s, d = HEADS[DEVICE.type]
    heads = [
        torch.randn(1, s, size, d, dtype=w.dtype, device=DEVICE).transpose(1, 2).requires_grad_()
        for size in (h, hkv, hkv)
    ]
    do = torch.randn_like(heads[0])

    def attend() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pyft.attention(*heads), heads, do)

    returned = do.nbytes + sum(x.nbytes for x in heads)
    found["attention"] = _peaks(attend, returned + 8 * h * s)
    n, v, d = LOSSES[DEVICE.type]
    hidden = torch.randn(n, d, dtype=w.dtype, device=DEVICE, requires_grad=True)
    head = torch.randn(v, d, dtype=w.dtype, device=DEVICE) * d**-0.5
    labels = torch.randint(v, (n,), device=DEVICE)
    for name, leaves in (("frozen head", [hidden]), ("trained head", [hidden, head])):
        head.requires_grad_(len(leaves) > 1)

        def lose(leaves: list[Tensor] = leaves) -> tuple[Tensor, ...]:
            return torch.autograd.grad(pyft.linear_cross_entropy(hidden, head, labels), leaves)

        tile = min(64 << 20, n * v * w.itemsize)
        found[f"loss, {name}"] = _peaks(lose, sum(x.nbytes for x in leaves) + tile)
    states = 2 * w.numel() + 2 * 4 * -(-w.numel() // 256)
    for name, make, counted in (
        ("AdamW8bit step", AdamW8bit, states),
        ("torch AdamW step", torch.optim.AdamW, 2 * w.nbytes),
    ):
        parameter = torch.nn.Parameter(w.clone())
        parameter.grad = torch.randn_like(w)
        optimizer = make([parameter], lr=1e-3)
        found[name] = _peaks(optimizer.step, counted, kept=True)
        del optimizer, parameter
    return found


def _peaks(call: Any, counted: int, kept: bool = False) -> dict[str, Any]:
    """Peaks of a first and a later call; with ``kept`` the first makes the states counted."""
    first, later = peak_bytes(call, DEVICE), peak_bytes(call, DEVICE)
    measured = first if kept else later
    return {"counted": counted, "first": first, "later": later, "ratio": measured / counted}


def chart(source: str, target: str) -> dict[str, Any]:
    """Draw what a results file holds."""
    from pyft.bench.plot import draw

    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(target))
    return {"bytes": Path(target).stat().st_size}


def main() -> None:
    """Run one part and print its result."""
    part, *arguments = sys.argv[1:]
    if part == "memory":
        found = memory()
        for name, entry in found.items():
            mib = {key: figure(entry[key] / 2**20) for key in ("counted", "first", "later")}
            print(f"{name:20} {mib} MiB, ratio {entry['ratio']:.3f}")
    elif part == "kernels":
        found = kernels(DEVICE, "--few" in arguments)
    else:
        found = environment() if part == "environment" else chart(*arguments)
    print(json.dumps(strict(found)))


if __name__ == "__main__":
    main()
