"""Everything there is to do on a machine with a GPU, in one go: build for that GPU, test, time;
results as JSON.

    python benchmarks/gpu.py --output DIR

Uses the Python and the packages that are there (torch, pybind11, pytest, pytest-benchmark, peft,
bitsandbytes) and no network. Each step has its own time limit and its result is written as soon as
it is known, most valuable first, so that being cut off loses least.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("devices", "kernels_quantize", "peft", "lora_linear")]


def run(name: str, command: list[str], limit: float, results: dict[str, Any], output: Path) -> bool:
    """Run one step; note its exit code, seconds and last lines in ``results`` and write them."""
    start = time.time()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYFT_CUDA_ARCHS": _architecture()}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = -1, f"stopped after {limit:.0f} s\n{error.stdout or b''!r}"
    tail = text.splitlines()[-40:]
    results["steps"].append(
        {
            "name": name,
            "code": code,
            "seconds": time.time() - start,
            "command": command,
            "tail": tail,
        }
    )
    (output / "gpu.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"{name}: exit {code}, {time.time() - start:.1f} s", *tail[-5:], sep="\n  ", flush=True)
    return code == 0


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def main() -> int:
    """Build, test and time; 0 when every step passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        print("make gpu: no GPU is visible to torch", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    output = output / name
    output.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "steps": [],
    }
    python = sys.executable
    timing = f"--benchmark-json={output / 'benchmark.json'}"
    passed = [
        run("build", [python, "setup.py", "build_ext", "--inplace"], 180, results, output),
        run("tests", [python, "-m", "pytest", "-q", *TESTS], 240, results, output),
        run(
            "bench",
            [python, "-m", "pytest", "-q", "benchmarks", "--benchmark-only", timing],
            180,
            results,
            output,
        ),
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
