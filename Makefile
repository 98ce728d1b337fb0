# One set-up for every target: a virtual environment beside this file, made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast durations test-all check bench docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## compress a small network with several solvers (under two minutes)
	$(BIN)/qcompress demo

test: $(READY)  ## the test suite (about 14 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(READY)  ## the quickest tests (under two minutes on two cores)
	$(BIN)/python -m pytest -n 2 --fast

durations: $(READY)  ## record what each test takes, which test-fast chooses by
	$(BIN)/python -m pytest -n 2 --record-durations

test-all: $(READY)  ## the test suite with the slow tests
	$(BIN)/python -m pytest -n 2 -m ''

check: $(READY)  ## format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## the shorter benchmarks, then every table of the documentation (20 minutes; SHARED=folder of the data)
	$(BIN)/python -m benchmarks $(if $(SHARED),--data $(SHARED))

docs: $(READY)  ## the documentation, its tutorials executed (docs/_build/html)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist docs/_build docs/tutorials docs/cli.md *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
