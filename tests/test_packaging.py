"""pyft as it is installed: an sdist, the wheel built from it, and a checkout with extensions built
in place.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import torch, pyft, pyft.kernels, pyft.embedded
from pyft.kernels import configs
w = torch.randn(48, 64)
q = pyft.quantize(w)
with pyft.backend("reference"):
    assert torch.equal(pyft.dequantize(q), pyft.quantize(w).dequantize())
assert pyft.availability()["quantize"]["cpu"] == "yes", pyft.availability()
assert (pyft.embedded.MODEL_DIR / "model.safetensors").is_file()
assert pyft.embedded.GENERAL_TEXT.is_file()
print(pyft.__file__)
"""

TINY = """
#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* made = PyModule_Create(&tiny);
  PyModule_AddIntConstant(made, "VALUE", VALUE);
  return made;
}
"""


def run(command: list[str], directory: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_checkout_on_the_path(tmp_path):
    """PYTHONPATH=. in the root with extensions built in place, from there and from elsewhere."""
    for directory in (ROOT, tmp_path):
        place = run([sys.executable, "-c", PROBE], directory, PYTHONPATH=str(ROOT))
        assert Path(place.strip()).is_relative_to(ROOT)


def test_changed_flags_reach_the_extension(tmp_path):
    """setup.py over a tree of one small file, built again with nothing new but a flag."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for folder in ("pyft", "csrc/cpu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyft" / "__init__.py").touch()
    (tmp_path / "csrc" / "bind_cpu.cpp").write_text(TINY, encoding="utf-8")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    show = [sys.executable, "-c", "from pyft import _cpu; print(_cpu.VALUE)"]
    for value in ("1", "2"):
        run(build, tmp_path, PYFT_NO_CUDA="1", PYFT_CXXFLAGS=f"-DVALUE={value}")
        assert run(show, tmp_path).strip() == value


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    # The wheel is built from the sdist; how fast its code is does not matter here.
    run(build, tmp_path, PYFT_NO_CUDA="1", PYFT_CXXFLAGS="-O0")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pyft/kernels/quantize.py" in names
    assert "pyft/finetune/report.html.j2" in names
    assert not any(name.startswith(("kernels/", "tests/", "csrc/")) for name in names)
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    run([sys.executable, *install], tmp_path)
    place = run([sys.executable, "-c", PROBE], tmp_path, PYTHONPATH=str(target))
    assert Path(place.strip()).is_relative_to(target)


def test_the_folder_hands_its_other_name_over(tmp_path):
    """``import kernels`` in a checkout is the other package of that name, or an empty one."""
    code = "import kernels, pyft.kernels; print(getattr(kernels, 'OTHER', kernels.__path__))"
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(ROOT)).strip() == "[]"
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("OTHER = 'theirs'\n", encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(other.parent)])
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=path).strip() == "theirs"


def test_a_checkout_shows_nothing_else_as_part_of_pyft(tmp_path):
    code = (
        "import importlib.util as u, pyft\n"
        "print([u.find_spec(f'pyft.{name}') for name in ('tests', 'pyft')])"
    )
    found = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(ROOT))
    assert found.strip() == "[None, None]"
