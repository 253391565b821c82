# Thin targets: `python -m preprocess` and `python -m loader` do the work and take the same flags.
#   make shards DATASET=pixmo_cap SOURCE=sample      make stream OUT=shards/pixmo_cap      make test

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# A machine without an NVIDIA GPU needs no CUDA build of torch; an index may be named by TORCH_INDEX.
TORCH_INDEX ?=
OUT    = shards/$(DATASET)

# upper-case variable -> flag of `python -m preprocess`
# Only what stands on make's command line counts: an exported SEED or CACHE must not change a job.
FLAGS := SOURCE=source SPLIT=split MODE=mode LIMIT=limit SEED=seed TOKENIZER=tokenizer \
	PAD_VOCAB=pad-vocab MESSAGE_FORMAT=message-format PROMPTS=prompts SYSTEM_PROMPT=system-prompt \
	VARIANTS=variants POINT_FORMAT=point-format CHOICES=choices PARAPHRASE=paraphrase \
	IMAGE_SIZE=image-size PATCH_SIZE=patch-size CROPS=crops HIGH_RES_CROPS=high-res-crops IMAGE_FIT=image-fit IMAGE_BOUND=image-bound CODEC=codec \
	QUALITY=quality KEEP=keep WORKERS=workers SHARD_SIZE=shard-size NUM_SHARDS=num-shards \
	CACHE=cache MAX_DEAD_LINKS=max-dead-links MAX_BAD_SAMPLES=max-bad-samples \
	USER_AGENT=user-agent ALLOW_HOSTS=allow-hosts READ_TIMEOUT=read-timeout WALL_TIMEOUT=wall-timeout \
	ATTEMPTS=attempts
GIVEN = $(foreach f,$(FLAGS),$(if $(filter command,$(origin $(firstword $(subst =, ,$f)))),--$(lastword $(subst =, ,$f)) '$($(firstword $(subst =, ,$f)))'))

.DEFAULT_GOAL := help
.PHONY: help shards plan verify datasets stream train test check bench setup

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo; echo "variables: DATASET OUT $(foreach f,$(FLAGS),$(firstword $(subst =, ,$f)))"

shards: $(VENV)/ready ## build the shards of DATASET (or finish an interrupted job)
	@$(PY) -m preprocess shards $(DATASET) --out '$(OUT)' $(GIVEN)

plan: $(VENV)/ready ## print what `make shards` would do
	@$(PY) -m preprocess plan $(DATASET) --out '$(OUT)' $(GIVEN)

verify: $(VENV)/ready ## compare every stored byte of OUT with its manifest
	@$(PY) -m preprocess verify '$(OUT)' $(if $(DEEP),--deep)

datasets: $(VENV)/ready ## list the datasets
	@$(PY) -m preprocess datasets

stream: $(VENV)/ready ## print one batch of OUT as training sees it
	@$(PY) -m loader peek '$(OUT)'

train: $(VENV)/ready ## train a small vision-language model on OUT
	@$(PY) examples/train.py '$(OUT)'

test: $(VENV)/ready-dev ## the test suite; ARGS= goes to pytest
	@$(PY) -m pytest $(ARGS)

check: $(VENV)/ready-dev ## lint, format, types and tests
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(PY) -m pytest $(ARGS)

bench: $(VENV)/ready-bench ## measure the loader beside its limits and beside other loaders; ARGS=--quick
	@$(PY) benchmarks/loader.py $(ARGS) && $(PY) benchmarks/assemble.py && $(PY) benchmarks/peers.py --plot benchmarks/peers.png $(ARGS)

setup: $(VENV)/ready-dev ## make the virtual environment

$(VENV)/ready: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[hub,fast]'
	@touch $@

$(VENV)/ready-bench: $(VENV)/ready-dev
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(PY) -m pip uninstall --quiet --yes torchvision
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mosaicml-streaming
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
