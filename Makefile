# Everything on a fresh machine with python3 (3.11 or newer) and make:
#   make serve    the built-in model on 32 virtual CPU devices, tp=8,cp=4
#   make test     the test suite
#   make ffi      the CUDA kernels (nvcc 12.3 or newer; two minutes of a core each, once)
PYTHON ?= python3
MESH ?= tp=8,cp=4
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The tests' reference is transformers on the CPU: this build of torch, not one with CUDA.
TORCH ?= torch==2.13.0
# 1 builds the CUDA kernels or fails, 0 doesn't, unset: where there are a GPU and nvcc. What `make ffi` built, later
# installs keep.
JAX_MLA_CP_CUDA ?= $(if $(wildcard $(VENV)/.cuda),1)
CUDA = $(if $(filter 0 off no false n f,$(JAX_MLA_CP_CUDA)),,$(JAX_MLA_CP_CUDA)$(wildcard /proc/driver/nvidia/version))
# The C++ extension is built where a GPU may use it, and for the tests; what was built once, later installs keep.
# Elsewhere the install is pure Python and needs no compiler: attention runs in XLA.
INSTALLED := $(VENV)/$(if $(or $(CUDA),$(wildcard $(VENV)/.extension),$(filter test soak,$(MAKECMDGOALS))),.extension,.pure)

FFI := $(filter-out %.md,$(wildcard ffi/*.* ffi/*/*))
CPP := $(filter %.h %.cc %.cu,$(FFI))
# An editable install knows its modules by their files: one that was moved or removed since needs a new one.
MOVED := $(shell [ ! -f $(VENV)/.modules ] || xargs ls -d <$(VENV)/.modules >/dev/null 2>&1 || echo moved)
# pip's progress bars, on a terminal.
PIP_INSTALL = $(BIN)/python -m pip install $$([ -t 1 ] || echo --quiet)
# Installs requirements from pyproject.toml: $(1) is an expression over it.
requirements = $(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*$(1), sep="\n")' \
	>$(VENV)/.requirements && $(PIP_INSTALL) -r $(VENV)/.requirements
# Without build isolation: its folders are new ones each time, and everything would be compiled again.
INSTALL = JAX_MLA_CP_CUDA=$(JAX_MLA_CP_CUDA) $(BIN)/python -m pip install --no-build-isolation --no-deps --verbose --editable .
# Runs an install with its output in $(VENV)/.log: shows what the build reports and each CUDA file, or all of it on failure.
logged = { { $(1); } 2>&1; echo $$? >$(VENV)/.status; } | tee $(VENV)/.log | \
	grep --line-buffered -oE 'jax_mla_cp: .*|\[[0-9]+/[0-9]+\] Building CUDA .*'; \
	[ "$$(cat $(VENV)/.status)" = 0 ] || { cat $(VENV)/.log >&2; exit 1; }
define install_extension
	@echo "Compiling the C++ extension into $(VENV), log in $(VENV)/.log: under a minute for the CPU$(if $(CUDA),; the CUDA kernels take two minutes of a core and 4.5 GB of memory for each of 4 files)"
	@$(call logged,$(INSTALL))
	@find jax_mla_cp -name '*.py' >$(VENV)/.modules
	@touch $(VENV)/.extension
endef

.PHONY: help env ffi serve test soak lint format clean moved

help:
	@echo "make serve [ARGS='--port 9000'] [MESH=tp=8,cp=4]   serve the built-in model"
	@echo "make test [ARGS='-k zigzag']                      run the tests"
	@echo "make soak                                         load, fault and fuzz tests in full (about three hours on 2 cores)"
	@echo "make lint | format                                check | apply the formatting: ruff, mypy, import-linter, clang-format"
	@echo "make env                                          the run-time environment in $(VENV); compiles nothing without a GPU"
	@echo "make ffi                                          with the CUDA kernels in it (needs nvcc)"
	@echo "make clean                                        remove $(VENV), build and caches"

env: $(INSTALLED)

ffi: JAX_MLA_CP_CUDA := 1
ffi: $(VENV)/.build
	$(install_extension)
	@touch $(VENV)/.cuda

serve: env
	@exec $(BIN)/python -m jax_mla_cp.serve --mesh $(MESH) $(ARGS)

test: $(INSTALLED) $(VENV)/.test
	@$(BIN)/python -m pytest $(ARGS)

soak: $(INSTALLED) $(VENV)/.test
	@SOAK=1 $(BIN)/python -m pytest tests/soak $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 can't make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

# The run-time packages, and the build backend, which is pure Python.
$(VENV)/.dependencies: pyproject.toml | $(BIN)/python
	@echo "Installing the run-time packages into $(VENV) (JAX, Flax, FastAPI, ...): about 200 MB to download"
	@$(call requirements,p["project"]["dependencies"])
	@$(call requirements,[r for r in p["build-system"]["requires"] if r.startswith("scikit-build-core")])
	@touch $@

$(VENV)/.pure: pyproject.toml $(VENV)/.dependencies $(MOVED)
	@echo "Installing jax_mla_cp into $(VENV), editable, pure Python: no CUDA kernels to compile"
	@$(call logged,$(INSTALL) --config-settings=wheel.cmake=false)
	@find jax_mla_cp -name '*.py' >$(VENV)/.modules
	@touch $@

# The build's requirements: jaxlib is the run-time's, and CMake is installed only where the system has none.
$(VENV)/.build: pyproject.toml $(VENV)/.dependencies
	@echo "Installing what the C++ build needs (nanobind; CMake and Ninja where the system has none): up to 35 MB to download"
	@$(call requirements,[r for r in p["build-system"]["requires"] if not r.startswith("jaxlib")])
	@$(BIN)/python -c 'from scikit_build_core.build import get_requires_for_build_editable as r; print(*r({}), sep="\n")' \
		>$(VENV)/.requirements && $(PIP_INSTALL) -r $(VENV)/.requirements
	@touch $@

$(VENV)/.extension: pyproject.toml $(FFI) $(VENV)/.build $(MOVED)
	$(install_extension)

# Enough for `make lint`, which reads the package where it is: an edit of ffi/ is not compiled for it.
$(VENV)/.test: pyproject.toml | $(VENV)/.dependencies
	@echo "Installing the tests' packages into $(VENV) (PyTorch, Transformers, lm-eval, ...): about 520 MB to download, more with a CUDA build of PyTorch"
	@$(PIP_INSTALL) $(TORCH)
	@$(call requirements,p["project"]["optional-dependencies"]["test"])
	@touch $@
