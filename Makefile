# Thin targets: `python -m preprocess` and `python -m loader` do the work.
#   make shards DATASET=pixmo_cap SOURCE=sample      make stream OUT=shards/pixmo_cap      make test

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# A machine without an NVIDIA GPU needs no CUDA build of torch; an index may be named by TORCH_INDEX.
TORCH_INDEX ?=
OUT    = shards/$(DATASET)

# Variables on make's command line become the flags of the same name: IMAGE_SIZE=224 is --image-size 224.
# Those that a target does not have are refused. Exported variables never change a job.
OWN     := PYTHON VENV TORCH_INDEX SHELL
# $(value) is what was typed, so that a dollar sign stays one; in single quotes the shell reads nothing else.
quote    = '$(subst ','\'',$1)'
define newline


endef
given    = $(filter-out $(OWN),$(foreach v,$(sort $(.VARIABLES)),$(if $(filter command,$(origin $v)),$v)))
one_line = $(if $(findstring $(newline),$(value $1)),$(error $1 has a line break),$(value $1))
run_of   = @$(PY) -m $1 make $@ $(foreach v,$(given),$(call quote,$v=$(call one_line,$v)))
run_verb = $(call run_of,preprocess)
only     = @:$(foreach v,$(filter-out $1,$(given)),$(error make $@ has no variable $v; it has: $(or $1,none)))

.DEFAULT_GOAL := help
.PHONY: help shards retry plan commit status verify report gc reshard merge split filter annotate features import export-index datasets doctor stream preview train docs test test-ray check bench setup

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo; echo "Variables are the flags of $(PY) -m preprocess TARGET --help: IMAGE_SIZE=224 is --image-size 224."

shards: $(VENV)/ready ## build the shards of DATASET, or resume an interrupted job
	$(run_verb)

retry: $(VENV)/ready ## download what failed for a passing reason, and build again if something came
	$(run_verb)

plan: $(VENV)/ready ## print what `make shards` would do
	$(run_verb)

commit: $(VENV)/ready ## complete a dataset whose shards are all built, as the last PART does
	$(run_verb)

status: $(VENV)/ready ## show how far the job in OUT is, and which parts are to be started
	$(run_verb)

verify: $(VENV)/ready ## compare every stored byte of OUT with its manifest
	$(run_verb)

report: $(VENV)/ready ## write report.html into OUT: numbers, charts and samples, to look at
	$(run_verb)

gc: $(VENV)/ready ## remove files that interrupted jobs have left in OUT (DRY_RUN=1 lists them)
	$(run_verb)

reshard: $(VENV)/ready ## write the samples of SRC into other shards, DST: SHARDS=, or NODES= RANKS= WORKERS=
	$(run_verb)

merge: $(VENV)/ready ## join the datasets SRC="a b" of one recipe into DST
	$(run_verb)

split: $(VENV)/ready ## assign the samples of SRC to the splits INTO=train=0.95,validation=0.05 of DST
	$(run_verb)

filter: $(VENV)/ready ## keep the samples of SRC with WHERE='num_tokens < 2048' or KEYS=file, in DST
	$(run_verb)

annotate: $(VENV)/ready ## add the columns of COLUMNS=scores.parquet to the samples of SRC, by key, as a view DST
	$(run_verb)

features: $(VENV)/ready ## store what the frozen vision model BACKBONE makes of the pictures of SRC, in DST
	$(call run_of,vlm_shards)

import: $(VENV)/ready ## index the WebDataset tars SRC in place; OUT= NAME=
	$(run_verb)

export-index: $(VENV)/ready ## write the index files of FORMAT=wids, energon or dali into OUT
	$(run_verb)

datasets: $(VENV)/ready ## list the datasets
	$(run_verb)

doctor: $(VENV)/ready ## check this machine: packages, GPU, shared memory, open files, access to URL
	$(run_verb)

stream: $(VENV)/ready ## print one batch of OUT as training sees it
	$(call only,DATASET OUT)
	@$(PY) -m loader peek '$(OUT)'

preview: $(VENV)/ready ## write preview.html: what a step of training on OUT sees; TO=preview.png draws it
	$(call only,DATASET OUT TO)
	@$(PY) -m loader preview '$(OUT)' $(if $(filter TO,$(given)),--out $(call quote,$(call one_line,TO)))

train: $(VENV)/ready ## train a small vision-language model on OUT
	$(call only,DATASET OUT)
	@$(PY) examples/train.py '$(OUT)'

# Compiled modules are kept even where the environment says otherwise: tests start Python 500 times.
test: $(VENV)/ready-dev ## the test suite, on all cores; ARGS= goes to pytest
	$(call only,ARGS)
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto --dist worksteal $(ARGS)

test-ray: $(VENV)/ready-ray ## the tests on Ray clusters, which `make setup` does not install (242 MB)
	$(call only,ARGS)
	@$(PY) -m pytest -m slow -k ray tests/preprocess/job/engines/test_ray.py tests/e2e/test_crash_matrix.py tests/e2e/test_integrations.py $(ARGS)

check: $(VENV)/ready-dev ## lint, format, types and tests
	$(call only,ARGS)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(MAKE) --no-print-directory test ARGS=$(call quote,$(ARGS))

bench: $(VENV)/ready-bench ## measure the loader beside its limits and beside other loaders; ARGS=--quick
	$(call only,ARGS)
	@$(PY) benchmarks/loader.py $(ARGS) && $(PY) benchmarks/assemble.py && $(PY) benchmarks/peers.py --plot benchmarks/peers.png $(ARGS)

docs: $(VENV)/ready-docs ## build the documentation site into build/docs/site; a link that leads nowhere stops it
	$(call only,)
	@$(PY) docs/site.py build/docs && cd build/docs && $(abspath $(VENV))/bin/zensical build --strict --clean

setup: $(VENV)/ready-dev ## make the virtual environment

$(VENV)/ready: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[hub,fast,video,documents,robots]'
	@touch $@

$(VENV)/ready-bench: $(VENV)/ready-dev
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(PY) -m pip uninstall --quiet --yes torchvision
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mosaicml-streaming
	@touch $@

$(VENV)/ready-ray: $(VENV)/ready-dev
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready-dev
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
