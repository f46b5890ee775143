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

MATRIX = "matrix"  # ends the name of what is launched where Triton has matrix units: not on sm_75
# Ends of the names of what is launched on these GPUs alone: those with tensor descriptors, those
# with shared memory and registers for wide tiles beside, and the classes of attention's tiles.
LAUNCHED_ON = {
    "tma": ["sm_90", "sm_100", "sm_120"],
    "wide": ["sm_90", "sm_100"],
    "no_matrix_units": ["sm_75"],
    "ampere": ["sm_80"],
    "small": ["sm_86", "sm_89", "sm_120"],
    "hopper": ["sm_90"],
    "blackwell": ["sm_100"],
    "amd": ["gfx942"],
}


def variants() -> dict[str, "Variant"]:
    """The compilations of each kernel that are looked at, as their launchers make them."""
    from compile_gate import Variant
    from compile_variants import fused_variants

    from pyft.kernels import configs, optim, qlinear, quantize

    exact = {"enable_fp_fusion": False}

    def stored(nested: bool, zeros: bool) -> tuple[dict[str, str], dict[str, Any]]:
        """Types of a weight's tensors, and those that are None."""
        types = {"packed_ptr": "*u8", "scales_ptr": "*u8" if nested else "*fp32"}
        types["codes_ptr"] = "*fp32"
        parts = ("nested_ptr", "offset_ptr", "scale_codes_ptr")
        absent: dict[str, Any] = {} if nested else dict.fromkeys(parts)
        types |= dict.fromkeys(parts, "*fp32") if nested else {}
        if zeros:
            return types | {"zeros_ptr": "*u8"}, absent
        return types, absent | {"zeros_ptr": None}

    def quantization(
        dtype: str, bits: int, block: int, e8m0: bool = False, zeros: bool = False
    ) -> Variant:
        kernel = quantize.quantize_kernel if block else quantize.quantize_row_kernel
        types = {"x_ptr": dtype, "thresholds_ptr": "*fp32", "order_ptr": "*u8"}
        types |= {"packed_ptr": "*u8", "scales_ptr": "*u8" if e8m0 else "*fp32"}
        types |= {"zero_code": "i32", "top": "fp32", "n" if block else "cols": "i32"}
        constants: dict[str, Any] = {"BITS": bits, "E8M0": e8m0}
        tile = configs.QUANTIZE.tile
        constants |= {"ROWS": max(1, tile // block), "BLOCK": block} if block else {"TILE": tile}
        if zeros:
            types["zeros_ptr"] = "*u8"
        else:
            constants["zeros_ptr"] = None
        return Variant(kernel, types, constants, exact | {"num_warps": configs.QUANTIZE.num_warps})

    def dequantization(
        dtype: str, bits: int, block: int, group: int, nested: bool = False, zeros: bool = False
    ) -> Variant:
        types, constants = stored(nested, zeros)
        names = ("first", "pitch", "length", "tiles", "row", "stride_out")
        types |= {"out_ptr": dtype} | dict.fromkeys(names, "i32")
        constants |= {"BITS": bits, "BLOCK": block, "NESTED_BLOCK": 256, "GROUP": group}
        constants["GROUPS"] = configs.DEQUANTIZE.tile // group
        options = exact | {"num_warps": configs.DEQUANTIZE.num_warps}
        return Variant(quantize.dequantize_kernel, types, constants, options)

    def linear(
        dtype: str, m: int, bits: int, block: int, nested: bool, zeros: bool, old: bool = False
    ) -> Variant:
        matrix = dtype != "*fp32" and not old
        config = configs.QLINEAR if matrix else configs.QLINEAR_NO_MATRIX_UNITS
        types, constants = stored(nested, zeros)
        types |= dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), dtype)
        types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_ym"), "i32")
        constants |= {"BITS": bits, "BLOCK": block, "NESTED_BLOCK": 256}
        constants |= {"GROUP": min(32, config.block_k)}
        constants |= {"BLOCK_M": m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        options = exact | {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Variant(qlinear.qlinear_kernel, types, constants, options)

    def optim_step(algorithm: int, dtype: str) -> Variant:
        import triton.language as tl

        scalars = ("sign", "beta1", "rest1", "beta2", "rest2", "keep", "decay", "step", "eps")
        types = {"table_ptr": "*i64", "codes_ptr": "*fp32", "starts_ptr": "*u8", "count": "i32"}
        types |= dict.fromkeys(scalars, "fp32")
        constants: dict[str, Any] = {"ALGORITHM": algorithm, "NESTEROV": False, "ALIGNED": True}
        constants |= {"DTYPE": getattr(tl, dtype), "ROWS": configs.OPTIM.rows, "PROBES": 8}
        options = exact | {"num_warps": configs.OPTIM.num_warps}
        return Variant(optim.optim_kernel, types, constants, options)

    return {
        "quantize/bf16/4bit/64": quantization("*bf16", 4, 64),
        "quantize/fp32/4bit/4096/zeros": quantization("*fp32", 4, 4096, zeros=True),
        "quantize/bf16/4bit/32/e8m0": quantization("*bf16", 4, 32, e8m0=True),
        "quantize/fp32/8bit/256": quantization("*fp32", 8, 256),
        "quantize/bf16/8bit/row": quantization("*bf16", 8, 0),
        "dequantize/bf16/4bit/64/nested": dequantization("*bf16", 4, 64, 8, nested=True),
        "dequantize/fp32/4bit/64": dequantization("*fp32", 4, 64, 8),
        "dequantize/bf16/4bit/128/zeros": dequantization("*bf16", 4, 128, 8, zeros=True),
        "dequantize/bf16/8bit/row": dequantization("*bf16", 8, 0, 8),
        "dequantize/fp16/4bit/64/nested/odd": dequantization("*fp16", 4, 64, 1, nested=True),
        f"qlinear/bf16/16/4bit/64/nested/{MATRIX}": linear("*bf16", 16, 4, 64, True, False),
        f"qlinear/fp16/64/4bit/128/zeros/{MATRIX}": linear("*fp16", 64, 4, 128, False, True),
        "qlinear/fp16/64/4bit/64/nested": linear("*fp16", 64, 4, 64, True, False, old=True),
        "qlinear/fp32/32/8bit/row": linear("*fp32", 32, 8, 0, False, False),
        "optim/adamw/bf16": optim_step(0, "bfloat16"),
        "optim/adamw/fp32": optim_step(0, "float32"),
        "optim/sgd/fp16": optim_step(2, "float16"),
        **fused_variants(),
    }


def targets_of(variant: str) -> list[str]:
    """The GPUs a variant is launched on."""
    from compile_gate import SHARED_LIMIT

    end = variant.rsplit("/", 1)[1]
    if end in LAUNCHED_ON:
        return LAUNCHED_ON[end]
    return [t for t in SHARED_LIMIT if t != "sm_75" or not variant.endswith(MATRIX)]


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Compile each variant for each target; only in a process without TRITON_INTERPRET."""
    from compile_gate import compile_for

    return {
        name: {target: compile_for(variant, target) for target in targets_of(name)}
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
