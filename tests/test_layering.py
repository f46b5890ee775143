"""What may import what (DESIGN.md), read from the source; what importing pyft loads; file names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyft"
STANDARD = sys.stdlib_module_names

# Parts of pyft each part may import at any place, besides itself and pyft.errors.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "formats": set(),
    "reference": {"formats"},
    "kernels": set(),
    "native": {"_cpu", "_cuda"},
    "op": set(),
    "quantized": {"formats", "ops"},
    "scratch": {"backend"},
    "ops": {"formats", "quantized", "op", "backend", "scratch"},
    "optim": {"formats", "ops"},
    "losses": {"ops"},
    "integrations": {"formats", "quantized", "backend", "ops", "nn"},
}
# Other packages each part may import. Parts not named here may import anything installed.
MAY_USE: dict[str, set[str]] = {
    "errors": set(),
    "formats": {"torch", "numpy"},
    "reference": {"torch", "numpy"},
    "kernels": {"torch", "triton"},
    "native": {"torch"},
    "backend": {"torch", "triton"},
    "op": {"torch"},
    "scratch": {"torch"},
    "quantized": {"torch"},
    "ops": {"torch"},
    "optim": {"torch"},
    "losses": {"torch"},
}
FORBIDDEN_ABOVE = {"kernels", "native", "_cpu", "_cuda"}
BELOW_INTEGRATIONS = {*MAY_USE}


def files() -> Iterator[tuple[str, Path]]:
    """(part of pyft, file) of all its sources: the first folder or the file's own name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").parts[0], path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield "kernels", path


SOURCES = list(files())


def imports(path: Path) -> Iterator[str]:
    """Full dotted names imported anywhere in a file, inside functions and for type checking too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dynamic_imports(path: Path) -> Iterator[str]:
    """Names given to importlib.import_module as a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def parts_of_pyft(names: Iterator[str]) -> set[str]:
    """``pyft.ops.quantize`` -> ops; names pyft itself re-exports count as nothing below."""
    dotted = [name.split(".") for name in names]
    known = {part for part, _ in SOURCES} | {"_cpu", "_cuda"}
    return {name[1] for name in dotted if name[0] == "pyft" and len(name) > 1 and name[1] in known}


def ids(source: tuple[str, Path]) -> str:
    return str(source[1].relative_to(ROOT))


def both(path: Path) -> set[str]:
    return {*imports(path), *dynamic_imports(path)}


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_imports_within_pyft(source: tuple[str, Path]) -> None:
    part, path = source
    used = parts_of_pyft(iter(both(path))) - {part, "errors"}
    if part in MAY_IMPORT:
        assert used <= MAY_IMPORT[part]
    elif part not in ("__init__", "backend"):
        assert not used & FORBIDDEN_ABOVE


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_imports_of_other_packages(source: tuple[str, Path]) -> None:
    part, path = source
    used = {name.split(".")[0] for name in both(path)} - STANDARD - {"pyft"}
    assert "kernels" not in used, "import it as pyft.kernels"
    if part in MAY_USE:
        assert used <= MAY_USE[part]


def test_backend_imports_implementations_lazily() -> None:
    tree = ast.parse((PACKAGE / "backend.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert {name.split(".")[0] for name in names} - STANDARD == {"pyft"}
    assert {name for name in names if name.startswith("pyft")} == {"pyft.errors"}


def loaded_by(script: str) -> set[str]:
    """Top-level modules in sys.modules after a script."""
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport sys; print(*sys.modules)"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "script",
    [
        "import pyft",
        "import pyft.finetune",
        "import pyft; pyft.backend('cpu'); dir(pyft)",
        "import pyft.cli",
    ],
)
def test_importing_pyft_is_light(script: str) -> None:
    assert not loaded_by(script) & {"torch", "triton", "transformers", "peft", "numpy", "trl"}


def test_ops_load_neither_triton_nor_transformers() -> None:
    script = (
        "import pyft, torch;"
        "w = pyft.quantize(torch.ones(2, 64));"
        "pyft.lora_linear(torch.ones(1, 64), w, None, None)"
    )
    loaded = loaded_by(script)
    assert "torch" in loaded
    assert not loaded & {"triton", "transformers", "peft"}


OPS = [path.stem for path in sorted((PACKAGE / "ops").glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_the_same_name_everywhere(op: str) -> None:
    assert (PACKAGE / "reference" / f"{op}.py").is_file()
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()


def test_every_reference_belongs_to_an_op() -> None:
    references = {path.stem for path in (PACKAGE / "reference").glob("*.py")} - {"__init__"}
    assert references == set(OPS)


def test_every_implementation_is_of_an_op() -> None:
    from pyft.backend import IMPLEMENTATIONS

    assert set(IMPLEMENTATIONS) == set(OPS)
    for kernel in (ROOT / "kernels").glob("*.py"):  # attention_backward is of attention
        of_op = kernel.stem in OPS or kernel.stem.startswith(tuple(f"{op}_" for op in OPS))
        assert of_op or kernel.stem in {"__init__", "tiles", "configs"}
