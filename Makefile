# Everything a fresh machine needs is set up on the way: a virtual environment in .venv, installed once.
PYTHON ?= python3
BIN := .venv/bin
GRID ?= experiments/quick.yaml
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := setup.cfg pyproject.toml constraints.txt

.PHONY: help sweep test lint figures clean

help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

sweep: .venv/.ready-run  ## run the quick sweep (GRID=FILE for another): table and figure under runs/
	$(BIN)/zoo sweep $(GRID)

figures: .venv/.ready-run  ## draw the figures of every run under runs/ again
	@for run in runs/*/; do $(BIN)/zoo plot $$run; done

test: .venv/.ready-test  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.ready-lint  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.ready-run: $(SETUP) | .venv/bin/pip
	$(INSTALL) --editable '.[ray]'
	@touch $@

.venv/.ready-test: $(SETUP) | .venv/bin/pip
	$(INSTALL) --editable '.[ray,parquet,test]'
	@touch $@

.venv/.ready-lint: $(SETUP) | .venv/bin/pip
	$(INSTALL) --editable '.[ray,parquet,test,lint]'
	@touch $@
