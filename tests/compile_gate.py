"""Compiles Triton kernels for GPUs that are not here and reads what the machine code needs of them.

The tools inside the triton package do it (ptxas, cuobjdump, nvdisasm), so neither a GPU nor a CUDA
toolkit is needed. Triton compiles kernels that ask for more shared memory than the GPU has;
``SHARED_LIMIT`` says what it has. Use it in a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# target -> bytes of shared memory that one program can have
SHARED_LIMIT = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
REGISTER_LIMIT = {target: 512 if target.startswith("gfx") else 255 for target in SHARED_LIMIT}

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
SASS_MATRIX = r"\b(?:HMMA|HGMMA|QMMA|QGMMA|IMMA|IGMMA|OMMA|UTCHMMA|UTCQMMA|UTCOMMA|UTCIMMA)\b"
SASS_WIDE_STORE = r"\bSTG\.E\.128\b"
PTX_INEXACT = r"\bfma\.rn\S*|\S+\.approx\S*|\bdiv\.full\S*|\S+\.ftz\S*"
GCN_MATRIX = r"\bv_(?:s?mfma\w*|wmma\w*)"
GCN_WIDE_STORE = r"\b(?:global|buffer|flat)_store_dwordx4\b"


@dataclass(frozen=True)
class Variant:
    """One compilation: ``types`` of the run-time arguments ("*bf16", "i32") and constexpr values.

    A pointer that is None at run time is a constant too. Pointers, and integers that the kernel
    specialises on, are taken to be divisible by 16, as they are in a common launch, but for those
    that ``odd`` names.
    """

    kernel: JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    odd: tuple[str, ...] = ()

    def source(self) -> ASTSource:
        """The kernel with its signature, as triton.compile takes it."""
        signature, attributes, constants = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            if param.name in self.constants:
                signature[param.name] = "constexpr"
                constants[(i,)] = self.constants[param.name]
                continue
            signature[param.name] = kind = self.types[param.name]
            if param.name in self.odd:
                continue
            if kind.startswith("*") or (kind.startswith("i") and not param.do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


def compile_for(variant: Variant, target: str) -> dict[str, int]:
    """Compile and measure.

    registers and spills (bytes) are a thread's, shared (bytes) is a program's. matrix and
    wide_stores count matrix and 16-byte store instructions; inexact, on NVIDIA only, counts
    contracted, approximate and flushing arithmetic.
    """
    amd = target.startswith("gfx")
    gpu = (
        GPUTarget("hip", target, 64)
        if amd
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    compiled = triton.compile(variant.source(), target=gpu, options=dict(variant.options))
    shared = {"shared": compiled.metadata.shared}
    if amd:
        return shared | _read_amd(compiled.asm["amdgcn"])
    inexact = {"inexact": len(re.findall(PTX_INEXACT, compiled.asm["ptx"]))}
    return shared | inexact | _read_nvidia(compiled.asm["cubin"])


def _read_amd(assembly: str) -> dict[str, int]:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])

    return {
        "registers": number("vgpr_count"),
        "spills": number("private_segment_fixed_size"),
        "matrix": len(re.findall(GCN_MATRIX, assembly)),
        "wide_stores": len(re.findall(GCN_WIDE_STORE, assembly)),
    }


def _read_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", "--no-dataflow", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no resource usage: {usage}")
    return {
        "registers": int(found[1]),
        "spills": int(found[2]),
        "matrix": len(re.findall(SASS_MATRIX, sass)),
        "wide_stores": len(re.findall(SASS_WIDE_STORE, sass)),
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
