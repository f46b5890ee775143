# Two commands for a fresh machine (Python >= 3.11, a C++ compiler, make): `make demo` and `make test`.
# PYTHON chooses the interpreter the environment is made with, VENV where it lies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench gpu format clean

demo: $(VENV)/installed
	$(BIN)/pyft demo $(DEMO)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

bench: $(VENV)/installed-dev
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/latest.json

# On a machine with a GPU and possibly no network: builds for that GPU with the Python that is there, then tests, then
# times; results as JSON under $(OUT). GPU takes options: GPU=--dry-run prints the plan.
gpu:
	$(PYTHON) benchmarks/gpu.py --output $(or $(OUT),benchmarks/results) $(GPU)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) torch
	$(INSTALL) --editable '.[finetune]'
	touch $@

# All at once: the extensions are built once, and what `installed` brings is there too.
$(VENV)/installed-dev: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build pyft.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f pyft/*.so
