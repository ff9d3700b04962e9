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
LOCK ?= requirements-lock.txt
CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 12 || echo none)
comma := ,
EXTRAS := dev$(if $(filter-out none,$(CUDA)),$(comma)cuda$(CUDA))

# The stamp carries the extras, so that an environment made before a GPU was there is made anew.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

DEMO_PROMPT ?= In three sentences: what does a computer do while it waits for memory?
DEMO_FLAGS ?= --max-model-len 1024 --max-num-seqs 4 --max-num-batched-tokens 256
BENCH_FLAGS ?=

.PHONY: help setup demo test test-all test-kernels lint format bench bench-compare clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the environment in .venv (Python, dependencies, this package)
	@echo "The environment is in $(VENV): $(BIN)/quire --help"

$(STAMP): pyproject.toml $(LOCK)
	@python=$$(PYTHON="$(PYTHON)" .ci/find-python) || exit 1; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || rm -rf $(VENV); \
	test -d $(VENV) || { echo "Making $(VENV) with $$python"; "$$python" -m venv $(VENV); } || exit 1; \
	echo "Installing quire-llm[$(EXTRAS)] (a minute or two the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),-c $(LOCK)) -e '.[$(EXTRAS)]' || exit 1; \
	rm -f $(VENV)/.installed-*; touch $@

demo: $(STAMP) ## stream an answer of a small real model, with its speed
	@$(BIN)/quire generate --model demo --chat --temperature 0 --max-tokens 96 $(DEMO_FLAGS) "$(DEMO_PROMPT)"

# The engine's tests compile some thousand executables. In a process of their own, because one that holds them all and then
# compiles more has been seen to crash inside XLA's serialization.
test: $(STAMP) ## run the tests, without the slow ones
	@$(BIN)/python -m pytest tests/engine
	@$(BIN)/python -m pytest --ignore=tests/engine

test-all: $(STAMP) ## run all tests
	@$(BIN)/python -m pytest -m "slow or not slow" tests/engine
	@$(BIN)/python -m pytest -m "slow or not slow" --ignore=tests/engine

test-kernels: $(STAMP) ## run all tests of the kernels
	@$(BIN)/python -m pytest -m "slow or not slow" tests/kernels

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
