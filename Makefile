# `make help` lists the targets. Variables you may set:
#   PYTHON=python3.12      the interpreter that .venv is made with (3.11 or newer)
#   PIP_ARGS="..."         more arguments for pip, such as --find-links DIR or --index-url URL
#   PYTEST_ARGS="..."      arguments for pytest instead of two at a time, such as -x, -k ledger

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format env bench soak million fuzz bench-gpu gpu-test clean FORCE

PYTHON ?= python3
PIP_ARGS ?=
# In the order of folders, so that the many short files of unit tests come last and both processes end together.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
SOAK_ARGS ?=
MILLION_ARGS ?=
FUZZ_RUNS ?= 20000
FUZZ_ARGS ?=
BENCH_ARGS ?= --out docs/benchmarks.json

# Whatever environment make was started from, .venv stands alone.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_CONSTRAINT
export PIP_USER := 0

BIN := .venv/bin
READY := .venv/.ready

# The stamp holds the folder it was made in: a copied or moved checkout would otherwise import the old folder's code.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
MOVED := FORCE
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY) ## make .venv with the pinned versions
	@$(BIN)/python -c 'import sys; print("The environment is ready: .venv, Python", sys.version.split()[0])'

$(READY): pyproject.toml constraints.txt $(MOVED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "imagemill needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make $(or $(MAKECMDGOALS),env) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Making .venv and installing the pinned versions; this takes a few minutes and some downloads."
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ]; then rm -rf .venv; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $@

demo: $(READY) ## run the examples with the embedded models
	@$(BIN)/imagemill run examples/tweets.json --out demo/tweets --workers 2 --rerun-changed
	@$(BIN)/imagemill run examples/prompts.jsonl --out demo/prompts --workers 2 --rerun-changed
	@$(BIN)/imagemill eval examples/bench_tiny/bench.jsonl --edit-model tiny-edit --judge reference --out demo/eval --workers 2 --rerun-changed
	@echo
	@for folder in demo/tweets demo/prompts demo/eval; do \
	  echo "Pictures: $(CURDIR)/$$folder ($$(find $$folder -name '*.png' -not -name '.*' | wc -l | tr -d ' ') files)"; \
	  echo "Report:   $(CURDIR)/$$folder/report.html"; \
	done

test: $(READY) ## run the tests, without the slow ones
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(READY) ## run the slow tests only
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

check: $(READY) ## format, lint and types, without changing a file
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m mypy

format: $(READY) ## format the code and mend what ruff can mend
	@$(BIN)/python -m ruff format
	@$(BIN)/python -m ruff check --fix

bench: $(READY) ## measure the cost of the machinery on this machine
	@$(BIN)/python bench/overhead.py

soak: $(READY) ## half an hour with a fault every second; SOAK_ARGS="--minutes 3"
	@$(BIN)/python tests/faults/soak.py $(SOAK_ARGS)

million: $(READY) ## a million tasks: the driver's memory, the time of a resume; MILLION_ARGS="--tasks 100000"
	@$(BIN)/python tests/faults/million.py $(MILLION_ARGS)

fuzz: $(READY) ## any bytes for every parser, 20,000 inputs each; FUZZ_RUNS=2000, FUZZ_ARGS="-k adapter"
	@IMAGEMILL_FUZZ=$(FUZZ_RUNS) $(BIN)/python -m pytest -q tests/faults/test_fuzz.py --timeout 0 \
	  --hypothesis-show-statistics $(FUZZ_ARGS)

# On a GPU machine the tests run under the Python that has its CUDA build of torch, not under .venv.
bench-gpu: $(READY) ## measure pictures a second on this machine's GPUs, into docs/benchmarks.json
	@$(BIN)/python bench/throughput.py --rows a,b,d,f,w,e --size 1024 --minutes 60 $(BENCH_ARGS)
	@$(BIN)/python bench/throughput.py --rows a,b,d,f,e --size 512 --minutes 60 $(BENCH_ARGS)
	@$(BIN)/python bench/throughput.py --rows a,b,d,f,e --model qwen-image-edit --tasks 12 --minutes 90 $(BENCH_ARGS)
	@$(BIN)/python bench/throughput.py --judge $(BENCH_ARGS)
	@$(BIN)/python bench/throughput.py --rows c,d --gpus 1,2 --tasks 96 --minutes 30 $(BENCH_ARGS)

gpu-test: ## run the scripts of tests/gpu (needs a CUDA build of torch in PYTHON)
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { \
	  echo "gpu-test needs a GPU and a Python with a CUDA build of torch and imagemill's dependencies:" >&2; \
	  echo "  pip install -e '.[dev]' there, then: make gpu-test PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@for script in $(wildcard tests/gpu/*.py); do \
	  echo "$$script"; PYTHONPATH=src $(PYTHON) "$$script" || exit 1; \
	done

clean: ## remove .venv, the demo's output and all caches
	@rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
