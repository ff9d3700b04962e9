# Everything that a developer does, each in one command. `make` lists the targets.
# Settings, as in `make setup CUDA=13`:
#   PYTHON   the interpreter that makes the environment (default: the first Python >= 3.12 that .ci/find-python finds)
#   CUDA     12, 13 or none (default: 12 if nvidia-smi finds a GPU, otherwise none)
#   LOCK     the file of pinned versions; empty = the newest versions that pyproject.toml allows

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
VENV_AOT := .venv-aot
BIN_AOT := $(VENV_AOT)/bin
LOCK ?= requirements-lock.txt
CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 12 || echo none)
comma := ,
EXTRAS := dev$(if $(filter-out none,$(CUDA)),$(comma)cuda$(CUDA))

# The stamp carries the extras, so that an environment made before a GPU was there is made anew.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
STAMP_AOT := $(VENV_AOT)/.installed

DEMO_PROMPT ?= In three sentences: what does a computer do while it waits for memory?
DEMO_FLAGS ?= --max-model-len 1024 --max-num-seqs 4 --max-num-batched-tokens 256
BENCH_FLAGS ?=
KERNEL_TESTS ?= slow or not slow
AOT_TABLE := docs/measurements/h200-aot.md

.PHONY: help setup demo test test-all test-kernels aot-table lint format bench bench-compare clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the environment in .venv (Python, dependencies, this package)
	@echo "The environment is in $(VENV): $(BIN)/quire --help"

# $(call environment,DIRECTORY,REQUIREMENTS): make an environment, if need be, and install into it.
define environment
	@python=$$(PYTHON="$(PYTHON)" .ci/find-python) || exit 1; \
	$(1)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || rm -rf $(1); \
	test -d $(1) || { echo "Making $(1) with $$python"; "$$python" -m venv $(1); } || exit 1; \
	echo "Installing $(2) (a minute or two the first time)"; \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),-c $(LOCK)) -e $(2) || exit 1; \
	rm -f $(1)/.installed*; touch $@
endef

$(STAMP): pyproject.toml $(LOCK)
	$(call environment,$(VENV),'.[$(EXTRAS)]')

# Of its own: a CPU environment with the GPU plugin in it would look for a GPU at every start.
$(STAMP_AOT): pyproject.toml $(LOCK)
	$(call environment,$(VENV_AOT),'.[aot]' pytest hypothesis)

demo: $(STAMP) ## stream an answer of a small real model, with its speed
	@$(BIN)/quire generate --model demo --chat --temperature 0 --max-tokens 96 $(DEMO_FLAGS) "$(DEMO_PROMPT)"

# The engine's tests compile some thousand executables, those of packed weights as many small ones. In processes of their own: on a
# CPU each executable takes some fifty memory mappings, of which Linux grants a process 65,530; beyond them XLA crashes.
PACKED := tests/quantization tests/quantizer
test: $(STAMP) ## run the tests, without the slow ones
	@$(BIN)/python -m pytest tests/engine
	@$(BIN)/python -m pytest $(PACKED)
	@$(BIN)/python -m pytest --ignore=tests/engine $(addprefix --ignore=,$(PACKED))

test-all: $(STAMP) ## run all tests
	@$(BIN)/python -m pytest -m "slow or not slow" tests/engine
	@$(BIN)/python -m pytest -m "slow or not slow" $(PACKED)
	@$(BIN)/python -m pytest -m "slow or not slow" --ignore=tests/engine $(addprefix --ignore=,$(PACKED))

test-kernels: $(STAMP) $(STAMP_AOT) ## run all tests of the kernels, compiling for a GPU that need not be there
	@$(BIN)/python -m pytest -m "$(KERNEL_TESTS)" tests/kernels
	@$(BIN_AOT)/python -m pallas_kernels.aot run $(BIN_AOT)/python -m pytest -m "slow or not slow" tests/aot

aot-table: $(STAMP_AOT) ## compile the kernels and whole steps for an H200 and write docs/measurements/h200-aot.md
	@$(BIN_AOT)/python -m pallas_kernels.aot table > $(AOT_TABLE).new
	@{ echo; echo "## Whole steps"; echo; $(BIN_AOT)/python -m benchmarks.aot_steps; } >> $(AOT_TABLE).new
	@mv $(AOT_TABLE).new $(AOT_TABLE)

lint: $(STAMP) ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP) ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure latency and throughput of the demo model
	@$(BIN)/quire bench latency $(BENCH_FLAGS)
	@$(BIN)/quire bench throughput $(BENCH_FLAGS)

bench-compare: $(STAMP) ## measure against other engines (each in its own environment)
	@$(BIN)/python -m benchmarks.compare $(BENCH_FLAGS)

clean: ## remove the environment and all caches of this folder (not the downloaded models)
	rm -rf $(VENV) $(VENV_AOT) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
