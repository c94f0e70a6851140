# make setup   virtual environment with the locked packages and the patched veRL
# make demo    setup, then the whole loop on a CPU with a real model; ends in a table
# make test    setup, linters, types, tests: no GPU, no network beyond the package registry
# make test-long   the same with a few whole training runs more
# make test-versions   core, engine and server tests with another torch and transformers
# make gpu-check   on a GPU machine, ten minutes: is it right, how fast; ends in a table
# make gpu-bundle  the same for a GPU node without network, in parts of 58 MiB
# make vllm-env  an environment of its own with vLLM, in .venv-vllm; VLLM_ENV="--cuda" for GPUs
# make docs    the documentation as a site, in build/site
# make lint    linters and types alone
# make format  let ruff rewrite what it can
# make clean   throw away the environment and the caches

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt
PATCHES := $(shell find verl_patches -name '*.patch')
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test test-long test-versions gpu-check gpu-bundle docs lint format clean vllm-env
help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -12

setup: $(VENV)/.patched

# Each step leaves a stamp; a step runs again when what it read is newer than its stamp.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 12))' || { \
	  echo "error: this needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "fix: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v git >/dev/null || { echo "error: this needs git, which patches veRL; fix: install it" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch by itself, with its dependencies: they differ between CPU and CUDA builds. The rest of the
# lock is complete, and pip's resolver would work on it for more than ten minutes: --no-deps.
$(VENV)/.installed: $(LOCK) pyproject.toml $(VENV)/.created
	@echo "== packages (some minutes the first time)"
	$(PIP) install --quiet --progress-bar off --no-compile "$$(grep '^torch==' $(LOCK))"
	$(PIP) install --progress-bar off --no-compile --no-deps -r $(LOCK) \
	  | awk '/^Collecting/ && ++n % 40 == 0 { print "   " n " packages"; fflush() }'
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The large parts of packages that nothing here imports; Python compiles the rest of them at need.
NOT_COMPILED := /(tests?|rllib|plotly|physics|pip)/|/transformers/models/(?!__init__|auto|llama|mistral|qwen|gemma)

# A tree that carries an older version of the patches cannot be patched over: take a fresh one.
$(VENV)/.patched: $(PATCHES) $(VENV)/.installed
	$(BIN)/python -m verl_patches apply || { \
	  $(PIP) install --quiet --force-reinstall --no-compile --no-deps "$$(grep '^verl==' $(LOCK))" \
	  && $(BIN)/python -m verl_patches apply; }
	@echo "== byte code, on all cores (pip would use one; some packages carry files that are none)"
	@$(BIN)/python -m compileall -qq -j 0 -x '$(NOT_COMPILED)' \
	  $(VENV)/lib cartridge_distill verl_patches training benchmarks || true
	@touch $@

# DEMO passes options on: make demo DEMO="--seed 1 --steps 48"
demo: setup
	@exec $(BIN)/python training/demo.py $(DEMO)

# GPU_CHECK passes options on: make gpu-check GPU_CHECK="--only kernels student"
gpu-check: setup
	@exec $(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

gpu-bundle: setup
	@exec $(BIN)/python -m benchmarks.gpu_bundle $(GPU_BUNDLE)

# vLLM pins another torch and transformers than the training.
vllm-env: setup
	$(BIN)/python -m cartridge_distill.engines.vllm --make-environment .venv-vllm $(VLLM_ENV)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two at a time, of a thread each: threads that spin for a core that another has make both slow.
WORKERS ?= 2
test test-long test-versions: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The runs and benchmarks that are left out of `make test` for their length, too.
test-long: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "long or not long"
	$(MAKE) test-versions

# What a GPU machine may have in place of the lock's: make test-versions TORCH=2.9.1 NEWER=5.10.4
TORCH ?= 2.11.0
NEWER ?= 5.17.0
OTHER ?= .venv-torch$(TORCH)-transformers$(NEWER)
OTHER_PIP = $(OTHER)/bin/python -m pip --disable-pip-version-check
TESTED := tests/cartridge tests/model tests/distill tests/data tests/cli tests/server \
  tests/verl/test_engine.py tests/verl/test_optimizer.py
# What transformers itself asks for is taken as it is in the lock, where transformers allows that.
$(OTHER)/.installed: $(LOCK)
	$(PYTHON) -m venv --clear $(OTHER)
	@echo "== torch $(TORCH), transformers $(NEWER) in $(OTHER) (a CUDA build of torch: gigabytes)"
	$(OTHER_PIP) install --quiet --progress-bar off --no-compile torch==$(TORCH)
	grep -v -E '^(torch|transformers|tokenizers)==' $(LOCK) > $(OTHER)/others.txt
	$(OTHER_PIP) install --quiet --progress-bar off --no-compile --no-deps -r $(OTHER)/others.txt
	$(OTHER_PIP) install --quiet --progress-bar off --no-compile transformers==$(NEWER)
	@touch $@

$(OTHER)/.patched: $(PATCHES) $(OTHER)/.installed
	$(OTHER)/bin/python -m verl_patches apply || { \
	  $(OTHER_PIP) install --quiet --force-reinstall --no-compile --no-deps "$$(grep '^verl==' $(LOCK))" \
	  && $(OTHER)/bin/python -m verl_patches apply; }
	@touch $@

test-versions: $(OTHER)/.patched
	$(OTHER)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(TESTED)

# An environment of its own: the site needs nothing of the project but its text.
DOCS := .venv-docs
$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --progress-bar off --disable-pip-version-check -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo build/site/index.html

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-torch* .venv-vllm $(DOCS) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
