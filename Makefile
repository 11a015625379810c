# Every target sets up .venv first; `make help` lists the targets. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
# The version used for all measurements; pyproject.toml says which others are accepted.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:
	@echo "make demo     immunise the bundled model on real data, write runs/demo/report.html (up to 10 minutes on 2 cores)"
	@echo "make test     run the tests"
	@echo "make lint     check style (ruff) and types (mypy)"
	@echo "make format   apply the style, to C++ too where clang-format is installed"
	@echo "make bench    run the benchmarks"
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
	@$(PIP) install --quiet --editable '.[dev]'
	@$(BIN)/python -c 'from cmai_fast.ops import backend_report as r; print("   operators:", ", ".join(f"{k}: {v}" for k, v in r().items()))'
	@touch $@

demo: $(STAMP)
	@echo "== demo: cmai-fast demo --out runs/demo"
	@$(BIN)/cmai-fast demo --out runs/demo

test: $(STAMP)
	@echo "== tests: pytest"
	@$(BIN)/python -m pytest -q

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
	  else echo "clang-format is not installed: csrc/ is left as it is"; fi

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks/ --benchmark-only

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find cmai_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
