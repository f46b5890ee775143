"""The C++ kernels of the CPU under the address and undefined-behaviour sanitizers.

They run in programs of their own, native_sanitizers*.cpp: each buffer has its exact size, so that
one element too far is an error, and every instruction set must write what the scalar code writes.
"""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from pyft.formats import (
    FORMATS,
    SCALE_FORMAT,
    code_table,
    e8m0_table,
    order_table,
    threshold_table,
)

CSRC = Path(__file__).parents[1] / "csrc"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512vbmi": [*AVX512, "-mavx512vbmi"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}  # by the end of a file's name

# What runs the kernels, and how many of its checks there must be at least.
PROGRAMS = {"": 5000, "_optim": 5000, "_layers": 5000, "_attention": 5000, "_logits": 5000}

# A planted fault for each kernel that reads or writes a vector at a time: one element too few.
OVERRUNS = {
    "input": "pyft_cpu_quantize(heap<float>(63), PYFT_F32, 64, 64, &coding, heap<uint8_t>(32), "
    "heap<float>(1), nullptr, isa, 1)",
    "codes": "pyft_cpu_quantize(heap<float>(64), PYFT_F32, 64, 64, &coding, heap<uint8_t>(31), "
    "heap<float>(1), nullptr, isa, 1)",
    "output": "pyft_cpu_dequantize(&weight, &slab, heap<float>(63), 64, PYFT_F32, isa, 1)",
    "x": "pyft_cpu_qlinear(heap<float>(63), 1, 64, &weight, nullptr, heap<float>(1), 1, PYFT_F32, "
    "isa, 1)",
    "gate": "pyft_cpu_glu(&glu, PYFT_F32, isa, 1)",
    "keys": "pyft_cpu_attention(&attention, &o, heap<float>(1), PYFT_F32, isa, 1)",
    "logits": "pyft_cpu_logit_statistics(&logits, &statistics, PYFT_F32, isa, 1)",
    "dz": "pyft_cpu_logit_gradient(&logits, &gradient, PYFT_F32, isa, 1)",
}

OVERRUN = r"""
#include <stdlib.h>
#include "pyft.h"
template <class T>
T* heap(int count) { return static_cast<T*>(calloc(count, sizeof(T))); }
int main() {
  const auto isa = pyft_cpu_best_isa();
  const pyft_coding coding = {4, 7, 1.0f, 0, heap<float>(15), heap<uint8_t>(16)};
  const pyft_weight weight = {4, heap<uint8_t>(32), heap<float>(1), nullptr, nullptr, nullptr,
                              heap<float>(16), nullptr, 1, 64, 64};
  const pyft_slab slab = {0, 1, 0, 64};
  const pyft_glu glu = {1, 64, PYFT_SILU, heap<float>(63), nullptr, heap<float>(64), 64, 64, 64};
  pyft_attention attention = {};
  attention.batch = attention.q_heads = attention.kv_heads = attention.q_len = 1;
  attention.k_len = 2, attention.dim = attention.v_dim = 32;
  attention.left = attention.right = PYFT_UNBOUNDED;
  attention.q = {heap<float>(32), 32, 32, 32}, attention.v = {heap<float>(64), 64, 64, 32};
  attention.k = {heap<float>(63), 64, 64, 32};
  const pyft_head_view o = {heap<float>(32), 32, 32, 32};
  const pyft_logit_view z = {heap<float>(63), 64, 1.0f, 0.0f};
  const pyft_logits logits = {1, 64, z, heap<int64_t>(1), nullptr, {}, nullptr};
  pyft_logit_statistics statistics = {};
  statistics.lse = heap<float>(1);
  pyft_logit_gradient gradient = {};
  gradient.lse = gradient.g_lse = gradient.g_target = heap<float>(1);
  (void)coding, (void)weight, (void)slab, (void)glu, (void)o, (void)logits;
  return CALL;
}
"""


def initializer(values: Iterable[float]) -> str:
    """A C++ list of floats, exact."""
    names = {"nan": "NAN", "inf": "INFINITY", "-inf": "-INFINITY"}
    return "{" + ", ".join(names.get(str(v), float(v).hex() + "f") for v in values) + "}"


def formats_header() -> str:
    """The tables of every format, as native_sanitizers.cpp includes them."""
    cpu = torch.device("cpu")
    entries = []
    for fmt in (*FORMATS.values(), SCALE_FORMAT):
        order = ", ".join(map(str, order_table(fmt, cpu).tolist()))
        numbers = f"{fmt.bits}, {fmt.zero_code}, {float(fmt.top).hex()}f, {int(fmt.e8m0)}"
        tables = (code_table(fmt, cpu).tolist(), threshold_table(fmt, cpu).tolist())
        entries.append(
            f'{{"{fmt.name}", {numbers}, {int(fmt.zero_points)}, '
            f"{', '.join(map(initializer, tables))}, {{{order}}}}}"
        )
    scales = initializer(code_table(SCALE_FORMAT, cpu).tolist())
    return (
        f"static const std::vector<Format> formats = {{{', '.join(entries)}}};\n"
        f"static const std::vector<float> scale_codes = {scales};\n"
        f"static const std::vector<float> e8m0_codes = {initializer(e8m0_table(cpu).tolist())};\n"
    )


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """csrc/cpu compiled with the sanitizers and the instruction sets of setup.py."""
    folder = tmp_path_factory.mktemp("sanitized")
    x86 = os.uname().machine in ("x86_64", "AMD64")
    running = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        isa = source.stem.rpartition("_")[2]
        if isa in ISA_FLAGS and not x86:
            continue
        target = folder / f"{source.stem}.o"
        flags = [*ISA_FLAGS.get(isa, []), *(["-DPYFT_X86=1"] if x86 else [])]
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
        f"-I{Path(__file__).parent}",
        *sanitize,
    ]


def run(program: str, objects: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    source, binary = folder / "main.cpp", folder / "main"
    source.write_text(program)
    (folder / "formats.h").write_text(formats_header())
    subprocess.run([*compiler(), str(source), *objects, "-o", str(binary)], check=True)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_are_clean(name: str, objects: list[str], tmp_path: Path) -> None:
    program = Path(__file__).with_name(f"native_sanitizers{name}.cpp").read_text()
    done = run(program, objects, tmp_path)
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    checks, failures = (int(word) for word in done.stdout.split() if word.isdigit())
    assert checks > PROGRAMS[name]
    assert failures == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", OVERRUNS)
def test_the_sanitizer_would_see_an_overrun(fault: str, objects: list[str], tmp_path: Path) -> None:
    done = run(OVERRUN.replace("CALL", OVERRUNS[fault]), objects, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
