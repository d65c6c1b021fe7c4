# `make demo`, `make test` and `make serve-check` set up what they need: nothing has to be installed first but Python.
# Variables: PYTHON (3.11 or newer), VENV, OUT. pip takes its own configuration: PIP_INDEX_URL, PIP_FIND_LINKS, ...

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
JOBS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development
DEMO := qcompiler/demo
SOURCES := $(shell find qcompiler passes -type f ! -name '*.pyc' ! -name '*.md')
SERVED := w4a16-asym w8a8+w4a16 fp8-dynamic awq-w4a16+gptq-w8a8 gptq-w8a8+awq-w4a16

.DELETE_ON_ERROR:
.PHONY: help demo test lint types tests serve-check clean

help:
	@echo "make demo         compile the bundled model to 4 and 8 bits, verify it, print what came of it"
	@echo "make test         everything CI checks: ruff, mypy, pytest"
	@echo "make serve-check  serve compiled checkpoints with vLLM on this CPU, in an environment of its own"
	@echo "make clean        remove outputs, caches and environments"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qcompiler needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

demo: $(RUNTIME)
	$(BIN)/qcompiler compile $(DEMO)/model --pipeline int4-int8 --dataset $(DEMO)/calibration.txt \
	  --samples 128 --output $(OUT)/demo --overwrite
	$(BIN)/qcompiler verify $(OUT)/demo --reference $(DEMO)/model --text $(DEMO)/evaluation.txt
	@echo "the checkpoint is in $(OUT)/demo"

test: lint types tests

lint: $(DEVELOPMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEVELOPMENT)
	$(BIN)/mypy

# Tests fill up disks of their own. Who may not mount any may do so in a namespace, where the system lets people make one.
tests: MOUNTING = $(shell unshare -m true 2>/dev/null || { unshare -rm true 2>/dev/null && echo unshare -rm; })

# One thread of arithmetic per process: the tests' tensors are small, and processes share the cores.
tests: $(DEVELOPMENT)
	OMP_NUM_THREADS=1 $(MOUNTING) $(BIN)/pytest -n $(JOBS) --dist loadgroup

serve-check: $(RUNTIME) $(SERVED:%=$(OUT)/serve/%/qcompiler.json)
	$(BIN)/python tools/serve/check.py $(SERVED:%=$(OUT)/serve/%)

$(OUT)/serve/%/qcompiler.json: $(RUNTIME) $(SOURCES)
	$(BIN)/qcompiler compile $(DEMO)/model --pipeline $* --target vllm-cpu --dataset $(DEMO)/calibration.txt \
	  --samples 64 --output $(OUT)/serve/$* --overwrite

clean:
	rm -rf out build dist *.egg-info .venv .venv-ci .venv-serve .venv-serve-wheels
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qcompiler passes tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
