SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := data/stdlib
QUESTIONS := data/code_questions
# Processes of recipes tiny and sft_tiny, which have 4 rows a step: 4, 2 or 1, as there are GPUs (or CPU cores, of which
# 2 are enough).
# Deferred: asked only after the installation.
NPROC ?= $(shell $(BIN)/python -c 'import os, torch; n = torch.cuda.device_count() or min(os.cpu_count(), 2); \
	print(max(p for p in (1, 2, 4) if p <= n))')
SYSTEM_TORCH ?=
ARGS ?=

.PHONY: help install pretrain sft extend-demo test lint format clean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: ARGS="more arguments", NPROC=processes, PYTHON=interpreter, VENV=folder, SYSTEM_TORCH=1'

install: $(VENV)/.installed  ## Create .venv and install the project (SYSTEM_TORCH=1: keep the torch of PYTHON)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes the first time"
	@$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	@$(if $(SYSTEM_TORCH),grep -vE '^(torch|triton)==',cat) constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
# Where torch is not in the environment, the torchrun on PATH is another Python's, which does not see the environment.
	@if [ ! -e $(BIN)/torchrun ]; then \
	printf '#!%s\nfrom torch.distributed.run import main\n\nmain()\n' "$$(realpath $(BIN))/python" > $(BIN)/torchrun; \
	chmod +x $(BIN)/torchrun; fi
	@touch $@

$(DATA)/dataset.json: | $(VENV)/.installed
	@$(BIN)/python launch/prepare_data.py --output $(DATA)

$(QUESTIONS)/train.jsonl: | $(VENV)/.installed
	@$(BIN)/python experiments/sparse_loss_sft/build.py --output $(QUESTIONS)

define TORCHRUN
processes=$(NPROC); threads=$$(( $$(nproc) / processes )); \
export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( threads > 0 ? threads : 1 ))}; \
$(BIN)/torchrun --standalone --nproc-per-node $$processes
endef

pretrain: $(VENV)/.installed $(DATA)/dataset.json  ## Prepare text and train recipe tiny (ARGS="train.steps=50")
	@$(TORCHRUN) launch/pretrain.py recipe=tiny $(ARGS)

sft: $(VENV)/.installed $(DATA)/dataset.json $(QUESTIONS)/train.jsonl  ## Make chat rows and fine-tune recipe sft_tiny on them
	@$(TORCHRUN) launch/sft.py recipe=sft_tiny $(ARGS)

extend-demo: $(VENV)/.installed  ## SmolLM2 (or a tiny Llama) in, trained at 2K with MoBA, out to transformers: CPU, minutes
	@$(BIN)/python experiments/extend_demo/run.py $(ARGS)

test: $(VENV)/.installed  ## Run the tests that need no GPU (ARGS="-k gate")
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

SHELL_FILES = .ci/run $(wildcard launch/slurm/*.sh launch/slurm/*.sbatch)

lint: $(VENV)/.installed  ## Check style, types, import directions, shell scripts and Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck $(SHELL_FILES)
	@if [ -x $(BIN)/hadolint ]; then set -x; $(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu; \
	else echo "hadolint: skipped, it has no package for this system"; fi

format: $(VENV)/.installed  ## Format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches; .venv, data and runs stay
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
	@find moba_train launch tests benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +
