# Two commands are enough on a fresh machine: `make demo` and `make test`.
# Both build what they need first: a virtual environment, the pinned packages, the C++ extension.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP    := $(BIN)/pip install --quiet --constraint $(CONSTRAINTS)
SOURCES := $(wildcard csrc/*.?pp)
CORE   := CMakeLists.txt pyproject.toml constraints.txt $(SOURCES) build/.modules

# An editable install knows the modules that were there; this file changes when their names do.
MODULES := $(sort $(shell find python/stepagent -name '*.py'))
$(shell mkdir -p build; echo $(MODULES) | cmp -s - build/.modules || echo $(MODULES) > build/.modules)

.PHONY: demo test test-all lint format types docs fuzz bench peers sdist wheels gpu-kit gpu-kit-cute clean

# A thread that waits for another lets go of its core: with other work about, spinning is far slower.
demo: $(VENV)/.demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/stepagent demo

# One process a core, one thread each: the tests' tensors are too small to share between threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard csrc/fuzz/*.?pp)

types: $(VENV)/.dev
	$(BIN)/mypy

# The site, into build/site. Warnings and links that lead nowhere are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(wildcard csrc/fuzz/*.?pp)

# Random inputs through the core under AddressSanitizer and UBSan: RUNS for each entry point.
# libFuzzer where there is Clang, else a driver without its guidance.
RUNS     ?= 100000
FUZZ_CXX ?= $(shell command -v clang++ || command -v c++)

fuzz: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/fuzz -G Ninja \
	  -DSTEPAGENT_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(FUZZ_CXX)
	$(BIN)/cmake --build build/fuzz
	for target in build/fuzz/csrc/fuzz/fuzz_*; do \
	  $$target -runs=$(RUNS) -seed=1 -max_len=128 || exit 1; \
	done

# The benchmarks of the README, but for those of training runs (benchmarks/claim/), and for those against TRL and verl, which are installed by hand (benchmarks/trees.py and packing.py).
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step_pair_update.py
	$(BIN)/python benchmarks/inspection.py
	$(BIN)/python benchmarks/trees.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/stepagent bench --suite cpu --op linear_logprobs
	$(BIN)/python benchmarks/environments.py
	$(BIN)/python benchmarks/rollouts.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/wheel.py

# What a bare GPU machine without internet needs, into build/gpu-kit (benchmarks/gpu/README.md): with
# a Python 3.12 and, for the compiled kernels, one that has the torch of that machine.
PYTHON312       ?= python3.12
PYTHON312_TORCH ?= $(PYTHON312)
GPU_KIT = $(PYTHON) benchmarks/gpu/kit.py --python $(PYTHON312) --torch-python $(PYTHON312_TORCH)

gpu-kit:
	$(GPU_KIT)

gpu-kit-cute:
	$(GPU_KIT) --cute

# The package in the trainers of others, in environments that these take.
HOSTS     := build/hosts-venv
VERL_HOST := build/verl-venv
HOST_TESTS := $(filter-out %_verl.py,$(wildcard tests/test_integrations*.py)) tests/test_examples.py

peers: $(HOSTS)/.made $(VERL_HOST)/.made
	OMP_NUM_THREADS=1 $(HOSTS)/bin/python -m pytest -q $(HOST_TESTS)
	OMP_NUM_THREADS=1 $(VERL_HOST)/bin/python -m pytest -q tests/test_integrations_verl.py

$(HOSTS)/.made: tests/hosts/others.txt $(CORE)
	$(MAKE) VENV=$(HOSTS) $(HOSTS)/.dev
	$(HOSTS)/bin/pip install --quiet --constraint $(CONSTRAINTS) --requirement $<
	touch $@

# verl pins older versions than ours of much; what it imports is in the list, its pins are not.
$(VERL_HOST)/.made: tests/hosts/verl.txt $(CORE)
	$(MAKE) VENV=$(VERL_HOST) $(VERL_HOST)/.built
	$(VERL_HOST)/bin/pip install --quiet stepagent --requirement $<
	$(VERL_HOST)/bin/pip install --quiet --no-deps verl==0.9.1 TransferQueue==0.1.11
	touch $@

# What is released, into dist/ (docs/releasing.md): the source, and from it the wheels of this
# machine's architecture. cibuildwheel needs Docker on Linux. It has an environment of its own: what
# it needs is at odds with the pins.
RELEASE := build/release-venv

sdist: $(RELEASE)/.made
	rm -rf dist
	$(RELEASE)/bin/python -m build --sdist --outdir dist

wheels: sdist
	$(RELEASE)/bin/cibuildwheel --output-dir dist dist/*.tar.gz

$(RELEASE)/.made: Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet cibuildwheel==4.3.5
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis
	rm -rf .mypy_cache .ruff_cache .import_linter_cache .grimp_cache

# The package alone, built without isolation so that CMake's cache is kept. Rebuilt when the C++
# sources, the pins or the modules' names change.
$(VENV)/.built: $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

# What it needs, each with the isolation that its own build expects: for the demo, for all work, or
# for the documentation.
$(VENV)/.demo: $(VENV)/.built
	$(PIP) "stepagent[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) "stepagent[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.built
	$(PIP) "stepagent[docs]"
	touch $@
