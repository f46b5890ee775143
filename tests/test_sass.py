"""What nvcc makes of the CUDA kernels: no local memory, 16-byte accesses, matrix instructions and
registers as expected in sass_table.json. Needs nvcc, no GPU.

TARGETS stand for all the wheel is built for. Nothing but mma.h asks which target it is compiled
for, and only whether that is 75; nvcc's PTX of each file is the same for 86 and 89 as for 80, and
for 100 as for 120; what is left to differ is how ptxas spends registers. 75, without bf16
arithmetic, and 90 are measured themselves.

``python tests/test_sass.py`` prints what is measured, in that file's form.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_120")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
WIDE_LOAD, WIDE_STORE = r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b"
MATRIX = r"\bHMMA\."
# Of each kernel at least this many 16-byte loads and stores: a gradient and a parameter in and a
# parameter out; a piece of four rows of W and one of x, but where even 8 elements are not aligned;
# o and its gradient; own rows and both kinds of columns, twice each, and a result.
FLOORS = {
    "attention.cu": (2, 0),
    "attention_backward.cu": (6, 1),
    "dequantize.cu": (1, 1),
    "optim.cu": (2, 1),
    "qlinear.cu": (5, 0),
    "quantize.cu": (1, 0),
}
UNALIGNED = "Access)2>"
LOCAL = r"\b(?:LDL|STL)\b"

# file -> kernel -> target -> registers, wide_loads, wide_stores
Table = dict[str, dict[str, dict[str, dict[str, int]]]]
TABLE: Table = json.loads(Path(__file__).with_name("sass_table.json").read_text())
ROWS = [
    (file, kernel, target)
    for file, kernels in TABLE.items()
    for kernel, targets in kernels.items()
    for target in targets
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH or in CUDACXX"),
]


def measure(directory: Path) -> Table:
    """Compile every kernel file for every target, and count."""
    jobs = [(file, target) for file in sorted(TABLE) for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda job: _measure(CUDA / job[0], job[1], directory), jobs))
    table: Table = {file: {} for file, _ in jobs}
    for (file, target), kernels in zip(jobs, found, strict=True):
        for kernel, numbers in kernels.items():
            table[file].setdefault(kernel, {})[target] = numbers
    return table


def _measure(source: Path, target: str, directory: Path) -> dict[str, dict[str, int]]:
    from compile_gate import TOOLS

    cubin = directory / f"{source.stem}.{target}.cubin"
    flags = ["-O3", "-std=c++17", "--fmad=false", f"-arch={target}", "-cubin", "-o", str(cubin)]
    _run([str(NVCC), *flags, str(source)])
    usage = _run([str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(cubin)])
    sass = _run([str(TOOLS / "nvdisasm"), "-c", str(cubin)])
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-|\Z)", sass, re.MULTILINE | re.DOTALL))
    numbers = {}
    for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage):
        numbers[_kernel(name)] = {
            "registers": int(registers),
            "local": int(stack) + len(re.findall(LOCAL, code[name])),
            "wide_loads": len(re.findall(WIDE_LOAD, code[name])),
            "wide_stores": len(re.findall(WIDE_STORE, code[name])),
        }
        if matrix := len(re.findall(MATRIX, code[name])):
            numbers[_kernel(name)]["matrix"] = matrix
    return numbers


def _kernel(mangled: str) -> str:
    """Name and template arguments, as in ``quantize<float, 4, false>``."""
    name = _run(["c++filt", mangled]).strip()
    found = re.search(r"(\w+(?:<[^(]*(?:\([^)]*\)[^(]*)*>)?)\((?!anonymous)", name)
    assert found is not None, name
    return found[1]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return measure(tmp_path_factory.mktemp("cubin"))


def test_table_is_complete(measured: Table) -> None:
    kernels = {path.name for path in CUDA.glob("*.cu") if "__global__" in path.read_text()}
    assert set(TABLE) == kernels
    found = [(f, k, t) for f, ks in measured.items() for k, ts in ks.items() for t in ts]
    assert sorted(found) == sorted(ROWS)


@pytest.mark.parametrize(("file", "kernel", "target"), ROWS)
def test_machine_code(measured: Table, file: str, kernel: str, target: str) -> None:
    found, expected = measured[file][kernel][target], TABLE[file][kernel][target]
    assert found["local"] == 0
    assert found["registers"] <= expected["registers"]
    for key in ("wide_loads", "wide_stores"):
        assert found[key] >= expected[key], key
    assert found.get("matrix", 0) == expected.get("matrix", 0)


@pytest.mark.parametrize("file", FLOORS)
def test_memory_is_read_and_written_16_bytes_at_a_time(file: str) -> None:
    loads, stores = FLOORS[file]
    for kernel, targets in TABLE[file].items():
        for target, numbers in targets.items():
            if kernel.endswith(UNALIGNED) or _is_empty(kernel, target):
                assert numbers["wide_loads"] == 0, (kernel, target)
                continue
            assert numbers["wide_loads"] >= loads, (kernel, target)
            assert numbers["wide_stores"] >= stores, (kernel, target)


def test_attention_is_products_of_matrices() -> None:
    """An instruction for each 8 columns of a tile and 16 of a head, of each product; two on sm_75,
    and none for bf16.
    """
    for file in ("attention.cu", "attention_backward.cu"):
        for kernel, targets in TABLE[file].items():
            if kernel.startswith("attention_delta"):
                continue
            head = int(kernel.split(", ")[1].rstrip(">"))
            gives = kernel.rpartition("Gives)")[2].rstrip(">") if "Gives" in kernel else ""
            count = {"": 2, "0": 3, "1": 4, "2": 3, "3": 2}[gives]
            columns = 16 if head == 256 or (gives == "1" and head == 128) else 32
            products = count * columns // 8 * min(head, 128) // 16
            for target, numbers in targets.items():
                expected = 0 if _is_empty(kernel, target) else products
                expected *= 2 if target == "sm_75" else 1
                assert numbers.get("matrix", 0) == expected, (kernel, target)


def _is_empty(kernel: str, target: str) -> bool:
    multiplies = kernel.startswith(("attention<", "attention_backward<"))
    return multiplies and "bfloat16" in kernel and target == "sm_75"


def test_every_file_has_a_floor() -> None:
    assert set(FLOORS) == set(TABLE)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for file, kernels in measure(Path(folder)).items():
            rows = [
                f'  "{kernel}": {{\n'
                + ",\n".join(f'   "{t}": {json.dumps(n)}' for t, n in targets.items())
                + "\n  }"
                for kernel, targets in sorted(kernels.items())
            ]
            lines.append(f' "{file}": {{\n' + ",\n".join(rows) + "\n }")
    print("{\n" + ",\n".join(lines) + "\n}")
