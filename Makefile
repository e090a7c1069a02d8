# On a fresh machine with Python 3.11 or later and a C++ compiler: `make demo`, then `make test`.

PYTHON ?= python3
VENV ?= .venv
# One process a core with one thread each; a file's tests stay together because they share fixtures, and the longest files
# come first (tests/conftest.py).
PYTEST_ARGS ?= --numprocesses auto --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help venv demo check format test test-gpu gpu-check bench bench-peers wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-12s %s\n' "$$name" "$$text"; done

venv: $(STAMP) $(KERNELS)  ## create .venv with the tested versions and hfquant itself, editable

# torch alone first: it is by far the largest download, and a failure there is then plain to see.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	HFQUANT_NO_KERNELS=1 $(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Compiled again when a source changes. Here a source that does not compile is an error, unlike in `pip install`.
$(KERNELS): $(STAMP) setup.py hfquant/build.py $(wildcard kernels/core/cpu/*.cpp kernels/core/cpu/*.h)
	$(if $(filter 1,$(HFQUANT_NO_KERNELS)),,$(BIN)/hfquant doctor --build)
	@touch $@

demo: venv  ## quantize a small model and show what it costs and what it saves
	$(BIN)/hfquant demo

check: venv  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv  ## rewrite the sources the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: venv  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

test-gpu: venv  ## the test suite, on a machine that must have a CUDA device
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no CUDA device')"
	$(BIN)/pytest $(PYTEST_ARGS)

gpu-check: venv  ## check and measure the kernels on a GPU, in ten minutes; refuses to without one
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

bench: venv  ## the measurements; rewrites benchmarks/results
	for script in $(filter-out benchmarks/peers.py benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python "$$script" || exit 1; done

bench-peers: venv  ## the comparison with other packages, which need environments: benchmarks/peers/README.md
	$(BIN)/python benchmarks/peers.py

# setuptools reuses build/lib, so a deleted module would come back in the wheel.
wheel: venv  ## build dist/hfquant-*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:  ## remove everything that can be made again
	rm -f kernels/*/cpu/*.so kernels/*/cpu/*.dylib
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
