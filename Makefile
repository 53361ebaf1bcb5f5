# Every target does the whole set-up on a fresh machine; a second call skips what is done.
#
#   make run       train with direct SCORE on the digits, with ARGS="..." for further options
#   make test      lint, types and the whole test suite, in one process a core (8 at most)
#   make soak      random inputs by the thousand, kills by the hundred; goes on after an interruption
#   make compare   direct SCORE beside its surrogates, on DATA=digits or DATA=toy
#   make results   docs/direct-score.md and its figures, from the stored results in docs/evidence
#   make docs      the documentation as a site in build/site, without network
#   make bench     time the kernels against eager PyTorch and torch.compile
#   make lint      style and types alone
#   make build     the set-up alone: virtual environment, dependencies, extension
#   make clean     remove the virtual environment and everything built
#
#   PYTHON  interpreter that makes the virtual environment      TORCH  version of torch to install
#   VENV    where the virtual environment is                    ARGS   further options of run, compare, bench, pytest
#   SCOREMATCH_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS: see setup.py

PYTHON ?= python3
TORCH ?= 2.14.1
VENV ?= .venv
DATA ?= digits
ARGS ?=
SCOREMATCH_CUDA ?= auto
export SCOREMATCH_CUDA

BIN := $(VENV)/bin
# Without bytecode, where python may write it: it compiles what it imports, which is a small part of torch.
NO_COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install $(NO_COMPILE)
BUILD_TOOLS := "setuptools>=77" wheel ninja pybind11
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
STAMP := $(VENV)/.scorematch-$(TORCH)-cuda-$(SCOREMATCH_CUDA)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: run test soak compare results docs bench lint build clean
.DELETE_ON_ERROR:

run: build
	$(BIN)/python -m training.run --objective score_direct $(ARGS)

test: lint
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: build
	SCOREMATCH_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

compare: build
	$(BIN)/python -m training.compare --data $(DATA) $(ARGS)

results: build
	$(BIN)/python -m training.experiments.page $(ARGS)

docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: build
	$(BIN)/python -m benchmarks.kernels $(ARGS)

lint: build
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== types"
	$(BIN)/mypy

build: $(STAMP)

$(TORCH_STAMP):
	@echo "== virtual environment in $(VENV), torch $(TORCH) (a download of some hundred MB to some GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10, set PYTHON=..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==$(TORCH) $(BUILD_TOOLS)
	@rm -f $(VENV)/.torch-* $(VENV)/.scorematch-*
	@touch $@

$(STAMP): $(TORCH_STAMP) $(SOURCES)
	@echo "== dependencies, and the extension compiled (CUDA: $(SCOREMATCH_CUDA))"
	@$(PIP) --no-build-isolation --editable ".[training,dev]" torch==$(TORCH)
	@rm -f $(VENV)/.scorematch-*
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find scorematch -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
