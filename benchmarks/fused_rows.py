"""Up to how many rows the kernel that decodes on the fly is the faster: ``FUSED_ROWS``' numbers.

    python benchmarks/fused_rows.py [--device cuda] [--json FILE]

For each dtype and number of rows: the time of the matmul over NF4 that decodes on the fly, over
that of decoding into the scratch and multiplying there, interleaved in one process, with the 10th
and 90th percentiles of the rounds' ratios. The scratch forgets the weight before each call.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import pyft
from pyft import scratch
from pyft.backend import select
from pyft.bench.report import describe
from pyft.bench.timing import clock_for, interleave, ratios
from pyft.ops import qlinear

N, K = 4096, 4096
ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SECONDS = 1.5  # for each pair


def call(rows: int, dtype: torch.dtype, device: torch.device, fused: bool) -> Callable[[], None]:
    """One of the two ways."""
    q = pyft.quantize(torch.randn(N, K, device=device) / K**0.5, "nf4")
    weight = qlinear.Stored(q.parts(), q.format.name, q.block_size, (N, K))
    x = torch.randn(rows, K, device=device).to(dtype)
    table = qlinear.FUSED_ROWS[select("qlinear", device)]

    def run() -> None:
        for buffer in list(scratch._all):
            buffer.holds = None
        before = table[dtype]
        table[dtype] = rows if fused else 0
        try:
            qlinear.forward(x, weight, None, "auto")
        finally:
            table[dtype] = before

    return run


def main() -> None:
    """Print the ratios, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description="decoding on the fly against decoding first")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock, found = clock_for(options.device), []
    for dtype in DTYPES:
        for rows in ROWS:
            pair = {
                "fused": call(rows, dtype, options.device, True),
                "decoded": call(rows, dtype, options.device, False),
            }
            samples = interleave(pair, clock, SECONDS)
            ratio = ratios(samples["fused"], samples["decoded"])
            name = str(dtype).removeprefix("torch.")
            figures = {"ratio": ratio.median, "p10": ratio.p10, "p90": ratio.p90}
            found.append({"dtype": name, "rows": rows, **figures})
            print(f"{name:9s} M={rows:4d}  {ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})")
    if options.json is not None:
        about = describe(options.device, "python benchmarks/fused_rows.py")
        result = {**about, "shape": f"{N}x{K}", "format": "nf4", "rows": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
