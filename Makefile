# Two commands are enough on a fresh machine: `make demo` and `make test`.
# Both build what they need first: a virtual environment, the pinned packages, the C++ extension.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORE   := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-all lint format types bench clean

# A thread that waits for another lets go of its core: with other work about, spinning is far slower.
demo: $(VENV)/.built
	OMP_WAIT_POLICY=PASSIVE $(BIN)/stepagent demo

# One process a core, one thread each: the tests' tensors are too small to share between threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.built
	$(PYTEST)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

types: $(VENV)/.built
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# The benchmarks of the README, but for the three seeds of the demo (benchmarks/demo_seeds.py), and
# for those against TRL and verl, which are installed by hand (benchmarks/trees.py and packing.py).
bench: $(VENV)/.built
	$(BIN)/python benchmarks/step_pair_update.py
	$(BIN)/python benchmarks/inspection.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/wheel.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Rebuilt when the C++ sources or the pins change. Without build isolation the CMake cache is kept.
$(VENV)/.built: $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@
