# Everything on a fresh machine with python3 (3.11 or newer) and make:
#   make serve    the built-in model on 32 virtual CPU devices, tp=8,cp=4
#   make test     the test suite
PYTHON ?= python3
MESH ?= tp=8,cp=4
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The tests' reference is transformers on the CPU: this build of torch, not one with CUDA.
TORCH ?= torch==2.13.0

.PHONY: help env serve test lint format clean

help:
	@echo "make serve [ARGS='--port 9000'] [MESH=tp=8,cp=4]   serve the built-in model"
	@echo "make test [ARGS='-k zigzag']                      run the tests"
	@echo "make lint | format                                ruff and mypy"
	@echo "make env                                          the run-time environment in $(VENV)"
	@echo "make clean                                        remove $(VENV) and caches"

env: $(VENV)/.run-time

serve: env
	@exec $(BIN)/python -m jax_mla_cp.serve --mesh $(MESH) $(ARGS)

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 can't make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.run-time: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run-time
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
