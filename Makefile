# Everything from a bare clone. Needs make and Python 3.11, 3.12 or 3.13; `make install` says what else is missing.
#
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) are honoured and never changed.

.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first interpreter that runs and is 3.11 (which the tests were run with), 3.12 or 3.13; PYTHON=... takes another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
# cpu, gpu, or auto: by what pip finds and whether nvidia-smi sees a GPU.
EXTRA ?= auto
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart
# More arguments for pytest: make test PYTEST_ARGS="-k losses -x"
PYTEST_ARGS ?=
# Two processes: most tests keep one core busy. Slow ones are dealt out by whole files, so that the tests of a file share
# their engines. pytest ends with 5 where PYTEST_ARGS leaves nothing to run, which is a failure only if it is so for both.
FAST = $(BIN)/python -m pytest -m "not slow and not full and not gpu" -n 2 --dist worksteal
SLOW = $(BIN)/python -m pytest -m "slow and not full" -n 2 --dist loadfile --no-loadscope-reorder

# One OpenMP thread a process: with more, the processes of a run fight for the same cores and slow down tenfold.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install quickstart cluster-demo test test-fast test-all test-gpu check format doctor clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Make .venv and install everything into it; a second run installs nothing
	@if [ -z "$(PYTHON)" ]; then \
	echo "install: no Python 3.11, 3.12 or 3.13 found; install python3.11 with its venv module, or say make PYTHON=/path/to/python3.11" >&2; \
	exit 2; fi
	@$(PYTHON) scripts/install.py --venv $(VENV) --extra $(EXTRA)

quickstart: install ## Run the whole recipe on this machine, tiny, and write a report
	@$(BIN)/posttrain run quickstart --run-dir $(RUN_DIR)
	@echo "report: $(abspath $(RUN_DIR))/report.html"

cluster-demo: install ## Run a short quick start on three hosts made of namespaces while one is powered off (needs root)
	@$(BIN)/python benchmarks/cluster_demo.py

test: install ## Run the tests, and list the slowest twenty of the fast and of the slow ones
	@$(FAST) --durations 20 $(PYTEST_ARGS); fast=$$?; [ $$fast != 2 ] || exit 2; \
	$(SLOW) --durations 20 $(PYTEST_ARGS); slow=$$?; \
	for code in $$fast $$slow; do [ $$code = 0 ] || [ $$code = 5 ] || exit $$code; done; \
	[ $$fast = 0 ] || exit $$slow

test-fast: install ## Run the tests that need no engine and no second process
	@$(FAST) $(PYTEST_ARGS)

test-all: install ## Run every test, full matrices included; the figures of the layouts go to benchmarks/results
	@$(BIN)/python -m pytest --figures benchmarks/results/layouts.json $(PYTEST_ARGS)

test-gpu: install ## Run the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py $(PYTEST_ARGS)

check: install ## Lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: install ## Rewrite the sources as `make check` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

doctor: install ## Say what works on this machine, and how to mend what does not
	@$(BIN)/posttrain doctor

clean: ## Remove what builds, tests and linters left; keeps .venv and runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
