# `make` lists the targets. Variables: PYTHON, the interpreter the environment is built from; TORCH, what pip installs
# for torch, for example "torch==2.13.0" for CUDA (default: the CPU build); ARGS, passed on to quickstart and tests.

VENV := .venv
STAMP := $(VENV)/.installed
BENCH_MODULES := benchmarks/annotation_document.py benchmarks/page_tables.py benchmarks/cells.py benchmarks/environments.py benchmarks/panglao_corpus.py benchmarks/turns.py benchmarks/scaling_document.py benchmarks/pretraining_document.py benchmarks/pretraining_run.py benchmarks/pretraining_trials.py benchmarks/scaling_memory.py benchmarks/scaling_store.py
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHON TORCH

# Another TORCH than the installed one is a reason to install again.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

.PHONY: help quickstart test test-slow test-cluster test-all check docs format bench constraints clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

quickstart: $(STAMP)  ## real cells from raw files to labels, in minutes (ARGS="--help" for choices)
	$(VENV)/bin/python launchers/quickstart.py $(ARGS)

test: $(STAMP)  ## the tests every change must pass (ARGS="-k masking" for some of them)
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes each
	$(VENV)/bin/python -m pytest -m slow -o cache_dir=.pytest_cache/slow --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-cluster: $(STAMP)  ## several hosts and a Slurm on this machine (root; says what to install)
	$(VENV)/bin/python -m pytest -m "cluster or slurm" -o cache_dir=.pytest_cache/cluster $(ARGS)

test-all: $(STAMP)  ## every test
	$(VENV)/bin/python -m pytest -m "" $(ARGS)

check: $(STAMP)  ## ruff, ruff format and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)  ## the documentation as pages in build/site; a warning is an error
	$(VENV)/bin/mkdocs --quiet build

format: $(STAMP)  ## rewrite the sources in house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(STAMP)  ## every benchmark in its quick form
	@set -e; for script in $(filter-out $(BENCH_MODULES),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(VENV)/bin/python $$script --quick; done

constraints:  ## resolve the newest allowed versions and rewrite constraints.txt
	sh launchers/setup_env.sh constraints

clean:  ## remove build artefacts, caches and what quickstart wrote; the environment stays
	rm -rf build dist *.egg-info quickstart_run .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove the environment too
	rm -rf $(VENV)

$(STAMP): setup.cfg constraints.txt pyproject.toml
	@rm -f $@
	@sh launchers/setup_env.sh install $(VENV)
	@printf '%s\n' "$$TORCH" > $@
