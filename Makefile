# Everything happens in one virtual environment; another interpreter: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test lint lint-format lint-style lint-types format demo clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make the virtual environment and install inflash and its developer tools into it, once

# pip knows dependency groups since 25.1; Python 3.11 brings an older one.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "inflash needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

test: $(STAMP) ## run the tests, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

lint: lint-format lint-style lint-types ## check the format, the style and the types

lint-format: $(STAMP)
	$(BIN)/ruff format --check .

lint-style: $(STAMP)
	$(BIN)/ruff check .

lint-types: $(STAMP)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(STAMP) ## bring the code into the format that lint asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP) ## convert the embedded model and run prompts from flash
	$(BIN)/inflash demo

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist inflash.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
