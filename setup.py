"""Builds the two native extensions: pyft._cpu always, pyft._cuda when nvcc is found.

Environment, read at build time only:
    PYFT_NO_CUDA=1           leave pyft._cuda out even if nvcc is there
    PYFT_CUDA_ARCHS=90a      semicolon-separated targets instead of all (+PTX embeds PTX)
    CUDACXX, CUDA_HOME       where to look for nvcc first
    CXX                      the C++ compiler
    PYFT_CXXFLAGS            flags added to every C++ file of pyft._cpu (sanitizers, for example)
    MAX_JOBS=4               files compiled at once; all cores without it
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ARCHS = "75;80;86;89;90;100;120;75+PTX;80+PTX;120+PTX"
X86 = platform.machine() in ("x86_64", "AMD64")
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 warns about its own AVX-512 headers, which read an undefined register on purpose.
AVX512 = [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mfma", "-mf16c"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vbmi": [*AVX512, "-mavx512vbmi"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-s"]


def isa_of(source: str) -> str | None:
    """The instruction set a file is compiled for, by its name's end; None: any CPU's."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else None


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    if os.environ.get("PYFT_NO_CUDA") == "1":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    candidates = (os.environ.get("CUDACXX"), str(home), shutil.which("nvcc"))
    return next((path for path in candidates if path and os.path.exists(path)), None)


def cuda_root(nvcc: str) -> Path:
    """The toolkit nvcc belongs to; nvcc itself may be a wrapper script elsewhere."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    here = re.search(r"_HERE_=(\S+)", dry.stderr)
    if here is None:
        raise RuntimeError(
            f"{nvcc} --dryrun names no toolkit; "
            f"set PYFT_NO_CUDA=1 to build without it:\n{dry.stderr}"
        )
    return Path(here.group(1)).parent


def known_archs(nvcc: str) -> str:
    """CUDA_ARCHS as far as this nvcc knows them; an old one builds for the GPUs of its time."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True
    ).stdout.split()
    known = {name.removeprefix("compute_") for name in listed}
    return ";".join(arch for arch in CUDA_ARCHS.split(";") if arch.removesuffix("+PTX") in known)


def gencode(archs: str) -> list[str]:
    """nvcc's -gencode options for a semicolon-separated list."""
    options = []
    for arch in archs.split(";"):
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        options += ["-gencode", f"arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"]
    return options


class Build(build_ext):
    """Compiles each file of an extension with its own flags, .cu files with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources, as many at once as there are cores, then link as setuptools does."""
        ext.include_dirs.append(pybind11.get_include())
        sources, ext.sources = ext.sources, []
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            ext.extra_objects += pool.map(lambda source: self._compile(source, ext), sources)
        # What setuptools compares dates with to see whether there is something to link.
        ext.depends = [*ext.depends, *sources, *ext.extra_objects]
        super().build_extension(ext)

    def _compile(self, source: str, ext: Extension) -> str:
        target = Path(self.build_temp) / ext.name / (Path(source).name + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        defines = [f"-D{name}={value}" for name, value in ext.define_macros]
        if source.endswith(".cu"):
            nvcc = find_nvcc()
            assert nvcc is not None
            archs = gencode(os.environ.get("PYFT_CUDA_ARCHS") or known_archs(nvcc))
            host = [
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                "-cudart",
                "static",
                "--threads",
                "2",
                "-Xfatbin",
                "-compress-all",
            ]
            flags = [nvcc, "-O3", "-std=c++17", "--fmad=false", *host, *archs]
        else:
            extra = os.environ.get("PYFT_CXXFLAGS", "").split()
            isa = ISA_FLAGS.get(isa_of(source) or "", [])
            flags = [os.environ.get("CXX", "g++"), *CXX_FLAGS, *isa, *extra]
        self.spawn([*flags, *defines, *includes, "-c", source, "-o", str(target)])
        return str(target)


def extensions() -> list[Extension]:
    """The CPU extension, and the CUDA one where nvcc is found."""
    cpu_sources = [
        "csrc/bind_cpu.cpp",
        *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
    ]
    if not X86:
        cpu_sources = [source for source in cpu_sources if isa_of(source) is None]
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    cpu = Extension("pyft._cpu", cpu_sources, language="c++", depends=headers)
    cpu.define_macros = [("PYFT_X86", "1")] if X86 else []
    extra = os.environ.get("PYFT_CXXFLAGS", "").split()
    cpu.extra_link_args = [*LINK_FLAGS, "-pthread", "-ldl", *extra]
    found = [cpu]
    if nvcc := find_nvcc():
        root = cuda_root(nvcc)
        cuda_sources = [
            "csrc/bind_cuda.cpp",
            *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu")),
        ]
        cuda = Extension("pyft._cuda", cuda_sources, language="c++", depends=headers)
        cuda.include_dirs = [str(root / "include")]
        static = next(root.rglob("libcudart_static.a"), None)
        if static is None:
            raise RuntimeError(
                f"{root} has no libcudart_static.a; set PYFT_NO_CUDA=1 to do without"
            )
        cuda.extra_link_args = [*LINK_FLAGS, str(static), "-ldl", "-lrt", "-pthread"]
        found.append(cuda)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
