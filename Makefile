# Everything on a fresh machine with python3 (3.11 or newer) and make:
#   make serve    the built-in model on 32 virtual CPU devices, tp=8,cp=4
#   make test     the test suite
#   make ffi      the FlashAttention-3 kernels (nvcc 12.3 or newer; a minute each, once)
PYTHON ?= python3
MESH ?= tp=8,cp=4
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The tests' reference is transformers on the CPU: this build of torch, not one with CUDA.
TORCH ?= torch==2.13.0
# 1 builds the kernels or fails, 0 doesn't, unset: where there is a GPU. What `make ffi` built, later installs keep.
JAX_MLA_CP_CUDA ?= $(if $(wildcard $(VENV)/.cuda),1)

FFI := $(filter-out %.md,$(wildcard ffi/*.* ffi/kernels/*))
# An editable install knows its modules by their files: one that was moved or removed since needs a new one.
MOVED := $(shell [ ! -f $(VENV)/.modules ] || xargs ls -d <$(VENV)/.modules >/dev/null 2>&1 || echo moved)
# Requirements come from pyproject.toml: REQUIREMENTS = an expression over it.
requirements = $(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*$(1), sep="\n")' \
	>$(VENV)/.requirements && $(BIN)/python -m pip install --quiet -r $(VENV)/.requirements
# Without build isolation: its folders are new ones each time, and everything would be compiled again.
INSTALL = JAX_MLA_CP_CUDA=$(JAX_MLA_CP_CUDA) $(BIN)/python -m pip install --no-build-isolation --no-deps --verbose --editable .

.PHONY: help env ffi serve test soak lint format clean moved

help:
	@echo "make serve [ARGS='--port 9000'] [MESH=tp=8,cp=4]   serve the built-in model"
	@echo "make test [ARGS='-k zigzag']                      run the tests"
	@echo "make soak                                         load, fault and fuzz tests in full (25 minutes on 2 cores)"
	@echo "make lint | format                                ruff, mypy, import-linter"
	@echo "make env                                          the run-time environment in $(VENV)"
	@echo "make ffi                                          with the FlashAttention-3 kernels in it (needs nvcc)"
	@echo "make clean                                        remove $(VENV), build and caches"

env: $(VENV)/.run-time

ffi: JAX_MLA_CP_CUDA := 1
ffi: $(VENV)/.build
	$(INSTALL)
	@touch $(VENV)/.cuda $(VENV)/.run-time
	@find jax_mla_cp -name '*.py' >$(VENV)/.modules

serve: env
	@exec $(BIN)/python -m jax_mla_cp.serve --mesh $(MESH) $(ARGS)

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(ARGS)

soak: $(VENV)/.test
	@SOAK=1 $(BIN)/python -m pytest tests/soak $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 can't make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

# What the package needs, then what its build needs: jaxlib is the run time's, and CMake only where the system has none.
$(VENV)/.build: pyproject.toml | $(BIN)/python
	@$(call requirements,p["project"]["dependencies"])
	@$(call requirements,[r for r in p["build-system"]["requires"] if not r.startswith("jaxlib")])
	@$(BIN)/python -c 'from scikit_build_core.build import get_requires_for_build_editable as r; print(*r({}), sep="\n")' \
		>$(VENV)/.requirements && $(BIN)/python -m pip install --quiet -r $(VENV)/.requirements
	@touch $@

# Says what the build has to say (CPU or CUDA, or why not), all of it if it fails.
$(VENV)/.run-time: pyproject.toml $(FFI) $(VENV)/.build $(MOVED)
	@echo "Installing jax_mla_cp into $(VENV), editable; the log is $(VENV)/.log"
	@$(INSTALL) >$(VENV)/.log 2>&1 || { cat $(VENV)/.log >&2; exit 1; }
	@sed -n 's/^ *\(jax_mla_cp: \)/\1/p' $(VENV)/.log | sort -u
	@find jax_mla_cp -name '*.py' >$(VENV)/.modules
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.run-time
	$(BIN)/python -m pip install --quiet $(TORCH)
	@$(call requirements,p["project"]["optional-dependencies"]["test"])
	@touch $@
