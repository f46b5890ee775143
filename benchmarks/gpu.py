"""Everything there is to do on a machine with a GPU, in one go and in less than nine minutes.

    python benchmarks/gpu.py --output DIR [--only NAME,...] [--dry-run] [--rehearse]

Uses the Python and the packages that are there and no network; wheels in a folder ``wheels`` or
``.whl`` of the checkout are unpacked beside them for the run. How steps share the time is in
gpu_run.py, what they do in pyft.bench and gpu_parts.py; this file plans.

Written under DIR/NAME-OF-THE-GPU: gpu.json (all steps and their results), tests.jsonl (a line a
test), bench*.json, .md and .png (`pyft bench`), log.txt (what the steps printed).
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Run, Step

PARTS = "benchmarks/gpu_parts.py"
SECONDS = 515.0  # for everything
BUILD = "build"  # the step whose failure leaves an older extension, or none

# Tests by what they are worth on a GPU: these and test_kernels_*.py first, LAST_TESTS at the end.
GPU_TESTS = (
    "devices",
    "quantize",
    "qlinear",
    "optim",
    "attention",
    "logits",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_linear",
    "lora_qkv",
    "lora_mlp",
    "lora_matmul",
    "skinny",
    "norm",
    "rope",
    "glu",
    "dropout",
    "bitsandbytes",
    "peft",
)
LAST_TESTS = ("compile_table", "cuda_sim", "native_sanitizers", "packaging")
CHUNKS = 3  # of the tests that are in neither

# Steps of `pyft bench`: the file its results are in, and its ops, most valuable first.
BENCHES = {
    "bench": ("bench", "dequantize qlinear adamw8bit quantize dropout"),
    "bench of attention": ("bench-attention", "attention chunked_attention"),
    "bench of the loss": ("bench-loss", "linear_cross_entropy linear_logprobs logits"),
    "bench of layers": (
        "bench-layers",
        "lora_linear lora_mlp decoder_layer lora_matmul skinny rms_norm rope swiglu lora_qkv "
        "layer_norm geglu",
    ),
}


def plan(output: Path, python: str, gpu: bool, parallel: bool, sanitizer: str | None) -> list[Step]:
    """The steps, most valuable first."""
    log = output / "tests.jsonl"
    first, middle, last = test_files(ROOT / "tests")
    no_gpu = "" if gpu else "no GPU is visible to torch"
    parts = [python, PARTS]

    def tests(name: str, files: Sequence[str], limit: float, least: float = 0.0) -> Step:
        command = [python, "-m", "pytest", "-q", "-p", "benchmarks.gpu_log", "--tb=short"]
        command += ["--continue-on-collection-errors", f"--test-log={log}", f"--chunk={name}"]
        command += ["-n", str(min(8, os.cpu_count() or 1))] if parallel else []
        return Step(
            name, [*command, *files], limit, least, lambda text: tally(log, name), needs=BUILD
        )

    def checked(tool: str, limit: float, least: float, *options: str) -> Step:
        name = f"compute-sanitizer {tool}"
        if sanitizer is None or not gpu:
            why = no_gpu or "compute-sanitizer is not on this machine"
            return Step(name, None, limit, missing=why)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *parts, "kernels", *options]
        return Step(name, command, limit, least, errors, needs=BUILD)

    def bench(name: str, budget: int, limit: float, least: float) -> Step:
        file, ops = BENCHES[name]
        path = output / f"{file}.json"
        command = [python, "-m", "pyft.cli", "bench", *ops.split(), "--peers"]
        command += [] if gpu else ["--shapes", "1b:k", "--tokens", "16"]
        command += ["--json", str(path), "--markdown", str(path.with_suffix(".md"))]
        command += ["--budget", str(budget)]
        return Step(name, command, limit, least, lambda text: timed(path), needs=BUILD)

    def chart(name: str) -> Step:
        path = output / f"{BENCHES[name][0]}.json"
        command = [*parts, "chart", str(path), str(path.with_suffix(".png"))]
        return Step(f"chart of {name}", command, 30, 8, needs=BUILD)

    chunks = [middle[index::CHUNKS] for index in range(CHUNKS)]
    return [
        Step(BUILD, [python, "setup.py", "-q", "build_ext", "--inplace"], 150, 60),
        Step("environment", [*parts, "environment"], 40, 10, json_line),
        tests("tests of kernels", first, 130, 60),
        bench("bench of attention", 40, 110, 50),
        bench("bench of the loss", 40, 110, 50),
        bench("bench of layers", 40, 120, 50),
        bench("bench", 20, 70, 30),
        Step("memory", [*parts, "memory"], 50, 15, json_line, needs=BUILD),
        checked("memcheck", 80, 30),
        *(tests(f"tests {i + 1} of {CHUNKS}", chunk, 90) for i, chunk in enumerate(chunks)),
        *(chart(name) for name in BENCHES),
        checked("racecheck", 60, 0, "--few"),
        tests("tests of builds", last, 90),
    ]


def test_files(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Test files by value: of kernels, the others, and those worth least on a GPU."""
    there = {path.stem.removeprefix("test_"): path for path in sorted(folder.glob("test_*.py"))}
    first = [GPU_TESTS[0], *(name for name in there if name.startswith("kernels_")), *GPU_TESTS[1:]]
    middle = [name for name in there if name not in (*first, *LAST_TESTS)]
    return tuple(  # type: ignore[return-value]
        [str(there[name].relative_to(folder.parent)) for name in names if name in there]
        for names in (first, middle, LAST_TESTS)
    )


def tally(log: Path, chunk: str) -> dict[str, Any]:
    """What the lines of tests.jsonl say of one chunk."""
    counts: dict[str, int] = {}
    failures = []
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["chunk"] == chunk:
            counts[entry["outcome"]] = counts.get(entry["outcome"], 0) + 1
            if entry["outcome"] == "failed":
                failures.append({"test": entry["test"], "message": entry["message"]})
    return {**counts, "failures": failures}


def timed(path: Path) -> dict[str, Any]:
    """How many rows of bench.json were timed, and which were not."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    bad = [
        f"{row['op']} {row['shape']} {row['variant']}: {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return {"timed": len(rows) - len(bad), "not timed": len(bad), "reasons": bad}


def json_line(text: str) -> Any:
    """The last line of a step's output, as JSON."""
    return json.loads(text.strip().splitlines()[-1]) if text.strip() else None


def errors(text: str) -> dict[str, int]:
    """What compute-sanitizer counted; -1 where it did not come to its end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return {"errors": int(found[-1]) if found else -1}


def unpack(wheels: Path | None, site: Path) -> list[str]:
    """Unpack wheels into a folder; their names."""
    names = sorted(wheels.glob("*.whl")) if wheels is not None else []
    for wheel in names:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return [wheel.name for wheel in names]


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or in the usual place."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(home))


def main() -> int:
    """Plan, run, print a table; 0 when every step succeeded that can run on this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="names of steps, apart by commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack beside")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU too: on the CPU, small"
    )
    options = parser.parse_args()
    name, architecture = graphics_card()
    if name is None and not (options.rehearse or options.dry_run):
        print("make gpu: no GPU is visible to torch; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    output = options.output.resolve() / re.sub(r"[^a-z0-9]+", "-", (name or "no GPU").lower())
    parallel = importlib.util.find_spec("xdist") is not None
    steps = plan(output, sys.executable, name is not None, parallel, find_sanitizer())
    wanted = [word.strip() for word in options.only.split(",") if word.strip()]
    if unknown := set(wanted) - {step.name for step in steps}:
        print(f"make gpu: --only: no step is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    steps = [step for step in steps if not wanted or step.name in wanted]
    if options.dry_run:
        for step in steps:
            print(f"{step.name} (at most {step.limit:.0f} s, sure of {step.least:.0f} s):")
            print(f"  {' '.join(step.command) if step.command else f'skipped: {step.missing}'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step's processes first
    with tempfile.TemporaryDirectory() as site:
        folders = (options.wheels, ROOT / "wheels", ROOT / ".whl")
        found = next((folder for folder in folders if folder and folder.is_dir()), None)
        wheels = unpack(found, Path(site))
        path = os.pathsep.join(filter(None, (str(ROOT), site, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if architecture:
            environment["PYFT_CUDA_ARCHS"] = architecture
        (output / "tests.jsonl").unlink(missing_ok=True)
        (output / "log.txt").unlink(missing_ok=True)
        run = Run(output, environment, options.seconds, facts={"gpu": name, "wheels": wheels})
        passed = run.go(steps)
    print(f"\n{run.table()}\n\n{output / 'gpu.json'}")
    return 0 if passed else 1


def graphics_card() -> tuple[str | None, str | None]:
    """The GPU's name and what to build for, or None, None."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


if __name__ == "__main__":
    sys.exit(main())
