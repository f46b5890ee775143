"""The C++ kernels of the CPU under the address and undefined-behaviour sanitizers.

They run in a program of their own, native_sanitizers.cpp: each buffer has its exact size, so that
one element too far is an error, and every instruction set must write what the scalar code writes.
"""

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
ISA_FLAGS = {
    "quantize_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "quantize_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

PROGRAM = Path(__file__).with_name("native_sanitizers.cpp").read_text()

OVERRUN = r"""
#include <stdlib.h>
#include "pyft.h"
int main() {
  float midpoints[15] = {0};
  auto* x = static_cast<float*>(calloc(63, 4));  // one too few
  unsigned char packed[32];
  float absmax[1];
  const auto isa = pyft_cpu_best_isa();
  return pyft_cpu_quantize4(x, PYFT_F32, 64, 64, midpoints, 7, packed, absmax, isa, 1);
}
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """csrc/cpu compiled with the sanitizers and the instruction sets of setup.py."""
    folder = tmp_path_factory.mktemp("sanitized")
    x86 = os.uname().machine in ("x86_64", "AMD64")
    running = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem in ISA_FLAGS and not x86:
            continue
        target = folder / f"{source.stem}.o"
        flags = [*ISA_FLAGS.get(source.stem, []), *(["-DPYFT_X86=1"] if x86 else [])]
        command = [*compiler(), *flags, "-c", str(source), "-o", str(target)]
        running.append((target, subprocess.Popen(command)))
    assert all(process.wait() == 0 for _, process in running)
    return [str(target) for target, _ in running]


def compiler() -> list[str]:
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    return [
        os.environ.get("CXX", "g++"),
        "-O1",
        "-g",
        "-std=c++17",
        "-pthread",
        f"-I{CSRC}",
        *sanitize,
    ]


def run(program: str, objects: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    source, binary = folder / "main.cpp", folder / "main"
    source.write_text(program)
    subprocess.run([*compiler(), str(source), *objects, "-o", str(binary)], check=True)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_kernels_are_clean(objects: list[str], tmp_path: Path) -> None:
    done = run(PROGRAM, objects, tmp_path)
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    checks, failures = (int(word) for word in done.stdout.split() if word.isdigit())
    assert checks > 5000
    assert failures == 0


@pytest.mark.slow
def test_the_sanitizer_would_see_an_overrun(objects: list[str], tmp_path: Path) -> None:
    done = run(OVERRUN, objects, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
