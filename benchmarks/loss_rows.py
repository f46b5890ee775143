"""From how many rows of logits at once a loss is no slower than with all of them: ``_ROWS`` of
pyft/ops/shared/head_input.py.

    python benchmarks/loss_rows.py [--device cuda] [--json FILE]

For each number of rows: the time of a forward and backward over a frozen bf16 head whose budget
holds so many, over that whose budget holds all, interleaved in one process, with the 10th and 90th
percentiles of the rounds' ratios.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import pyft
from pyft.bench.report import describe
from pyft.bench.timing import clock_for, interleave, ratios

M, V, D = 1024, 32000, 1024
ROWS = (16, 32, 64, 128, 256, 512)
SECONDS = 8.0  # for each pair


def call(rows: int, device: torch.device) -> Callable[[], None]:
    """A step with logits of so many rows at once."""
    hidden = torch.randn(M, D, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device=device) * D**-0.5).bfloat16()
    labels = torch.randint(V, (M,), device=device)
    budget = rows * V * hidden.element_size() / 2**20

    def run() -> None:
        hidden.grad = None
        pyft.linear_cross_entropy(hidden, weight, labels, budget=budget).backward()

    return run


def main() -> None:
    """Print the ratios, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description="some rows of logits at once against all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock, found = clock_for(options.device), []
    for rows in ROWS:
        pair = {"some": call(rows, options.device), "all": call(M, options.device)}
        samples = interleave(pair, clock, SECONDS)
        ratio = ratios(samples["some"], samples["all"])
        found.append({"rows": rows, "ratio": ratio.median, "p10": ratio.p10, "p90": ratio.p90})
        print(f"{rows:5d} rows  {ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})")
    if options.json is not None:
        about = describe(options.device, "python benchmarks/loss_rows.py")
        result = {**about, "shape": f"M={M} V={V} D={D}", "dtype": "bfloat16", "rows": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
