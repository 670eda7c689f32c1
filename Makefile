# The everyday commands. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?=
MODEL ?=
ARGS ?=
UV_VERSION := 0.13.8
# What to install: `cpu` or `cuda`, by what the machine has; override with `export ACCELERATOR=cpu`.
ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps
LOCK := locks/$(ACCELERATOR).txt
STAMP := $(VENV)/.installed-$(ACCELERATOR)
OTHER = $(filter-out $(ACCELERATOR),$(sort $(patsubst $(VENV)/.for-%,%,$(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.for-* $(VENV)/.installed-*)))))
# uv reads find-links from its own variable; a machine that configures pip keeps its wheels in sight that way.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup lock sft grpo smol reward-models pipeline bench bench-rewards bench-routing replay-tables probe-rewards drill gpu-check lint test test-slow test-architectures test-instruction-sets test-transformers4 mutations format clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: $(STAMP) ## install everything, pinned, into .venv (costs nothing the second time)

# Compiled once, here: where PYTHONDONTWRITEBYTECODE is set, every process would compile what it imports, for ten seconds.
# Where venv found no ensurepip it has left a python without pip, and is asked again.
# An environment is of one ACCELERATOR: two packages hold vLLM, and a torch that is there counts as the one that is asked for.
$(STAMP): $(LOCK) pyproject.toml
	$(if $(OTHER),$(error $(VENV) has the packages of ACCELERATOR=$(OTHER), not of $(ACCELERATOR): `make clean` first, or `export ACCELERATOR=$(OTHER)`))
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	touch $(VENV)/.for-$(ACCELERATOR)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(INSTALL) --compile-bytecode -r $(LOCK) \
	  || $(INSTALL) --compile-bytecode --torch-backend $(if $(filter cpu,$(ACCELERATOR)),cpu,auto) -r $(LOCK)
	$(INSTALL) --editable .
	touch $@

lock: ## resolve the pins of locks/*.txt anew
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --extra cpu --extra evaluation --extra dev --override locks/overrides.txt \
	  --python-version 3.11 --no-annotate --no-header --no-emit-find-links -o locks/cpu.txt
	UV_FIND_LINKS= $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --extra cuda --extra evaluation --extra dev --override locks/overrides.txt \
	  --python-version 3.11 --no-annotate --no-header -o locks/cuda.txt
	echo 'transformers<5' | $(BIN)/uv pip compile - --quiet --upgrade --no-annotate --no-header --python-version 3.11 --no-emit-find-links \
	  | grep -E '^(transformers|tokenizers|huggingface-hub)==' > locks/transformers4.txt

sft: $(STAMP) ## Chat SFT (RECIPE=recipes/nano/sft.yaml ARGS="key=value ...")
	$(BIN)/align sft $(or $(RECIPE),recipes/nano/sft.yaml) $(ARGS)

grpo: $(STAMP) ## Chat SFT, then GRPO (RECIPE=recipes/nano/grpo.yaml ARGS="key=value ...")
	$(BIN)/align grpo $(or $(RECIPE),recipes/nano/grpo.yaml) $(ARGS)

smol: $(STAMP) ## DPO of SmolLM2-135M-Instruct on pairs of its own words (MODEL=DIR, else hub or package; ARGS="key=value ...")
	model=$$($(BIN)/python recipes/smollm2/find_model.py models/smollm2-135m-instruct $(MODEL)) \
	  && pairs=models/$$(basename $$model)-pairs.jsonl \
	  && $(BIN)/python recipes/smollm2/pairs.py $$model $$pairs \
	  && $(BIN)/align dpo $(or $(RECIPE),recipes/smollm2/dpo.yaml) model.path=$$model data.path=$$pairs $(ARGS)

reward-models: $(STAMP) ## the nano pipeline up to its reward models: helpful, safety, math, code (ARGS="key=value ...")
	$(BIN)/align pipeline recipes/nano/pipeline.yaml --to rm_code $(ARGS)

pipeline: $(STAMP) ## the whole alignment at nano size, with evaluations and one report (ARGS="key=value ...")
	$(BIN)/align pipeline $(or $(RECIPE),recipes/nano/pipeline.yaml) $(ARGS)

bench: $(STAMP) ## a GRPO step against TRL and the bare engines (ARGS="--settings short")
	$(BIN)/python benchmarks/grpo_step.py $(ARGS)

bench-rewards: $(STAMP) ## math answers and sandboxed programs per second
	$(BIN)/python benchmarks/rewards.py

bench-routing: $(STAMP) ## what recording and replaying experts costs
	$(BIN)/python benchmarks/routing.py

replay-tables: $(STAMP) ## what replay and corrections do to a mismatched policy: the tables of docs/moe.md, about an hour (ARGS=--tiny)
	$(BIN)/python benchmarks/replay_tables.py $(ARGS)

probe-rewards: $(STAMP) ## what cheap tricks do to the rewards that ship: the table of docs/rewards.md
	$(BIN)/python benchmarks/probe_rewards.py

drill: $(STAMP) ## faults of every kind on this machine, and whether the promises hold (ARGS="--random-kills 300")
	$(BIN)/python benchmarks/drill.py $(ARGS)

gpu-check: $(STAMP) ## what works on this machine's GPU, and how fast: docs/gpu.md (ARGS="--only e", ARGS=--tiny)
	PYTHONPATH=benchmarks $(BIN)/python -m gpu_check $(ARGS)

lint: style ## style, import contract and types
	$(BIN)/mypy

.PHONY: style
style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Four at once, for none of them keeps a core busy all the time: mypy, the tests that share engines, those of the rewards, and all others.
# The engines take longest: left to itself, Ray would have its workers yield to all that runs beside them. Some of the rewards' tests have limits of
# time: a session of their own gives them a share of the processors that does not shrink with what the others start.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest
UNITS := -m "not engines and not slow"
test: $(if $(ARGS),$(STAMP),style) ## lint and all quick tests (ARGS="tests/reward -k math": these tests alone)
ifeq ($(ARGS),)
	@nice $(BIN)/mypy > .mypy.log 2>&1 & mypy=$$!; \
	  RAY_worker_niceness=0 $(PYTEST) -m "engines and not slow" > .engines.log 2>&1 & engines=$$!; \
	  setsid $(PYTEST) $(UNITS) tests/reward > .rewards.log 2>&1 & rewards=$$!; \
	  trap 'kill $$mypy $$engines $$rewards 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	  nice -n 5 $(PYTEST) $(UNITS) --ignore=tests/reward; status=$$?; \
	  wait $$rewards || status=$$?; echo "tests of the rewards:"; cat .rewards.log; \
	  wait $$engines || status=$$?; echo "tests that share engines:"; cat .engines.log; \
	  wait $$mypy || status=$$?; echo "mypy:"; cat .mypy.log; \
	  rm -f .mypy.log .engines.log .rewards.log; exit $$status
else
	$(PYTEST) $(ARGS)
endif

# Another transformers before all else that .venv has.
OLDER := .venv-transformers4
$(OLDER)/.installed: $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(OLDER)
	$(BIN)/uv pip install --quiet --python $(OLDER)/bin/python --no-deps -r locks/transformers4.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $(OLDER)/lib/python*/site-packages)/beside.pth
	touch $@

test-transformers4: $(OLDER)/.installed ## checkpoints as transformers 4.57 and PEFT on it read them
	$(BIN)/pytest -m slow tests/align/model/test_older_forms.py

test-slow: $(OLDER)/.installed ## the nano recipe at full size on three seeds, and what else takes minutes
	$(BIN)/pytest -m slow -s

test-architectures: $(STAMP) ## SFT and GRPO of eleven other architectures at nano size
	$(BIN)/pytest -m architectures -s

# ISA of torch's own kernels, then of oneDNN's; the last pair is an AVX-512 CPU without AMX and bfloat16.
INSTRUCTION_SETS := default:AVX2 avx2:AVX2 avx512:AVX512_CORE
test-instruction-sets: $(STAMP) ## what depends on a CPU's rounding, as CPUs with other instruction sets compute it
	set -e; for pair in $(INSTRUCTION_SETS); do echo "== $$pair"; ATEN_CPU_CAPABILITY=$${pair%:*} ONEDNN_MAX_CPU_ISA=$${pair#*:} \
	  $(BIN)/pytest $(or $(ARGS),tests/align/learner tests/align/losses tests/align/evaluate/test_agreement_gate.py tests/align/stages/test_reward_model.py); done

mutations: $(STAMP) ## break the code on purpose: do the tests notice? (ARGS="--only WORD")
	$(BIN)/python tests/mutations.py $(ARGS)

format: $(STAMP) ## format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## take away the environment and caches; runs stay
	rm -rf $(VENV) $(OLDER) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
