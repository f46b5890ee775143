"""Every Triton kernel compiles for every GPU generation, within what compile_table.json expects.

``python tests/test_compile_table.py`` prints what is measured, in that file's form.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from compile_gate import Variant

pytestmark = pytest.mark.slow

TABLE: dict[str, dict[str, dict[str, int]]] = json.loads(
    Path(__file__).with_name("compile_table.json").read_text()
)
ROWS = [(variant, target) for variant, targets in TABLE.items() for target in targets]


def variants() -> dict[str, "Variant"]:
    """The compilations of each kernel that are looked at, as their launchers make them."""
    from compile_gate import Variant

    from pyft.kernels import configs, quantize

    exact = {"enable_fp_fusion": False}

    def quantize4(dtype: str, block: int) -> Variant:
        types = {
            "x_ptr": dtype,
            "midpoints_ptr": "*fp32",
            "packed_ptr": "*u8",
            "absmax_ptr": "*fp32",
        }
        types |= {"n": "i32", "zero_code": "i32"}
        constants = {"ROWS": max(1, configs.QUANTIZE.tile // block), "BLOCK": block}
        options = exact | {"num_warps": configs.QUANTIZE.num_warps}
        return Variant(quantize.quantize4_kernel, types, constants, options)

    def quantize_absmax() -> Variant:
        floats = ("x_ptr", "offset_ptr", "midpoints_ptr", "absmax_ptr")
        types = dict.fromkeys(floats, "*fp32") | {
            "codes_ptr": "*u8",
            "n": "i32",
            "zero_code": "i32",
        }
        constants = {"ROWS": configs.QUANTIZE.tile // 256, "BLOCK": 256}
        options = exact | {"num_warps": configs.QUANTIZE.num_warps}
        return Variant(quantize.quantize_absmax_kernel, types, constants, options)

    def dequantize4(dtype: str, nested: bool, group: int) -> Variant:
        types = {
            "packed_ptr": "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            "codes_ptr": "*fp32",
        }
        types |= {"out_ptr": dtype}
        types |= dict.fromkeys(("first", "length", "tiles", "stride_out"), "i32")
        constants: dict[str, Any] = {"BLOCK": 64, "NESTED_BLOCK": 256}
        constants |= {"GROUP": group, "GROUPS": configs.DEQUANTIZE.tile // group}
        parts = ("nested_ptr", "offset_ptr", "absmax_codes_ptr")
        if nested:
            types |= dict.fromkeys(parts, "*fp32")
        else:
            constants |= dict.fromkeys(parts, None)
        options = exact | {"num_warps": configs.DEQUANTIZE.num_warps}
        return Variant(quantize.dequantize4_kernel, types, constants, options)

    return {
        "quantize4/bf16/64": quantize4("*bf16", 64),
        "quantize4/fp32/4096": quantize4("*fp32", 4096),
        "quantize_absmax": quantize_absmax(),
        "dequantize4/bf16/nested": dequantize4("*bf16", nested=True, group=8),
        "dequantize4/fp32": dequantize4("*fp32", nested=False, group=8),
        "dequantize4/fp16/nested/odd": dequantize4("*fp16", nested=True, group=1),
    }


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Compile each variant for each target; only in a process without TRITON_INTERPRET."""
    from compile_gate import SHARED_LIMIT, compile_for

    return {
        name: {target: compile_for(variant, target) for target in SHARED_LIMIT}
        for name, variant in variants().items()
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout)
    return table


def test_table_is_complete(measured: dict[str, dict[str, dict[str, int]]]) -> None:
    assert sorted((name, target) for name in measured for target in measured[name]) == sorted(ROWS)


@pytest.mark.parametrize(("variant", "target"), ROWS)
def test_resources(
    measured: dict[str, dict[str, dict[str, int]]], variant: str, target: str
) -> None:
    found, expected = measured[variant][target], TABLE[variant][target]
    for key in ("registers", "spills", "shared"):
        assert found[key] <= expected[key], key
    assert found["matrix"] == expected["matrix"]
    assert found["wide_stores"] >= expected["wide_stores"]
    assert found.get("inexact", 0) <= expected.get("inexact", 0)


def test_expectations_respect_the_limits_of_the_gpus() -> None:
    from compile_gate import REGISTER_LIMIT, SHARED_LIMIT

    for variant, target in ROWS:
        assert TABLE[variant][target]["shared"] <= SHARED_LIMIT[target]
        assert TABLE[variant][target]["registers"] <= REGISTER_LIMIT[target]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
