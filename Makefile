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

# The same for the verbs that cut datasets anew; there WORKERS is what reads, JOBS what copies.
RESHARD_FLAGS := SPLIT=split SHARDS=shards SHARD_SIZE=shard-size NODES=nodes RANKS=ranks \
	WORKERS=workers ORDER=order SEED=seed THROUGH=through JOBS=jobs INTO=into SALT=salt \
	WHERE=where KEYS=keys NAME=name
RESHARD = $(foreach f,$(RESHARD_FLAGS),$(if $(filter command,$(origin $(firstword $(subst =, ,$f)))),--$(lastword $(subst =, ,$f)) '$($(firstword $(subst =, ,$f)))')) \
	$(if $(filter 1,$(VIEW)),--view) $(if $(filter 0,$(VIEW)),--copy) $(if $(DRY_RUN),--dry-run)

.DEFAULT_GOAL := help
.PHONY: help shards plan verify gc reshard merge split filter import export-index datasets stream train test check bench setup

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo; echo "variables: DATASET OUT SRC DST VIEW DRY_RUN $(foreach f,$(RESHARD_FLAGS),$(firstword $(subst =, ,$f)))"
	@echo "of shards and plan: $(foreach f,$(FLAGS),$(firstword $(subst =, ,$f)))"

shards: $(VENV)/ready ## build the shards of DATASET (or finish an interrupted job)
	@$(PY) -m preprocess shards $(DATASET) --out '$(OUT)' $(GIVEN)

plan: $(VENV)/ready ## print what `make shards` would do
	@$(PY) -m preprocess plan $(DATASET) --out '$(OUT)' $(GIVEN)

verify: $(VENV)/ready ## compare every stored byte of OUT with its manifest
	@$(PY) -m preprocess verify '$(OUT)' $(if $(DEEP),--deep)

gc: $(VENV)/ready ## remove what interrupted jobs have left in OUT (DRY_RUN=1 lists it)
	@$(PY) -m preprocess gc '$(OUT)' $(if $(DRY_RUN),--dry-run) $(if $(OLDER_THAN),--older-than '$(OLDER_THAN)')

reshard: $(VENV)/ready ## cut SRC anew into DST: SHARDS=, or NODES= RANKS= WORKERS= (VIEW=0: files of its own)
	@$(PY) -m preprocess reshard '$(SRC)' '$(DST)' $(RESHARD)

merge: $(VENV)/ready ## join the datasets SRC="a b" of one recipe into DST
	@$(PY) -m preprocess merge $(SRC) '$(DST)' $(RESHARD)

split: $(VENV)/ready ## deal SRC to the splits INTO=train=0.95,validation=0.05 of DST
	@$(PY) -m preprocess split '$(SRC)' '$(DST)' $(RESHARD)

filter: $(VENV)/ready ## keep of SRC, in DST, what WHERE='num_tokens < 2048' or KEYS=file says
	@$(PY) -m preprocess filter '$(SRC)' '$(DST)' $(RESHARD)

import: $(VENV)/ready ## index the WebDataset tars SRC where they lie; OUT= NAME=
	@$(PY) -m preprocess import $(SRC) --out '$(OUT)' --name '$(NAME)' $(if $(SPLIT),--split '$(SPLIT)')

export-index: $(VENV)/ready ## write the index files of FORMAT=wids, energon or dali into OUT
	@$(PY) -m preprocess export-index '$(OUT)' --format '$(FORMAT)'

datasets: $(VENV)/ready ## list the datasets
	@$(PY) -m preprocess datasets

stream: $(VENV)/ready ## print one batch of OUT as training sees it
	@$(PY) -m loader peek '$(OUT)'

train: $(VENV)/ready ## train a small vision-language model on OUT
	@$(PY) examples/train.py '$(OUT)'

# Compiled modules are kept even where the environment says otherwise: tests start Python 500 times.
test: $(VENV)/ready-dev ## the test suite, on all cores; ARGS= goes to pytest
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto --dist worksteal $(ARGS)

check: $(VENV)/ready-dev ## lint, format, types and tests
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(MAKE) --no-print-directory test ARGS='$(ARGS)'

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
