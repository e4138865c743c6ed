.PHONY: help venv demo test test-fast drills floors check format wheel clean ci
.DEFAULT_GOAL := help

BIN := .venv/bin
STARTED := $(shell date +%s)
STAMP := .venv/.complete
# One more than the cores that tests are made for: much of their time is waiting. The tests of a file stay together, for
# what they share is made once.
WORKERS ?= -n 3 --dist loadfile --no-loadscope-reorder
KILLS ?= 50
DRILLS := preemption stage_kills strategy_changes evaluation_resume sharded_runs

help:       ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP)  ## create .venv with the pinned packages, if it is not there or the pins changed
	@:

$(STAMP): setup.cfg pyproject.toml constraints.txt weights.txt .ci/venv
	@PYTHON="$(PYTHON)" .ci/venv

demo: venv  ## make documents, train the embedded default through its stages, score it
	@$(BIN)/python cli.py demo --started $(STARTED)

test: venv  ## all tests
	@$(BIN)/python -m pytest $(WORKERS)

test-fast: venv  ## the tests that take less than two seconds each
	@$(BIN)/python -m pytest $(WORKERS) -m "not slow"

drills: venv  ## the long drills: many kills, every run in new interpreters (20 minutes)
	@FRESH_PROCESSES=1 $(BIN)/python -m tests.drills.resume --kills $(KILLS)
	@FRESH_PROCESSES=1 $(BIN)/python -m pytest -q -m slow $(addprefix tests/integration/test_,$(DRILLS:=.py)) tests/parity/test_packing.py tests/slurm

floors: venv  ## the quick tests with the lowest versions that setup.cfg allows
	@.ci/floors

check: venv  ## style, words, types and import rules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/python .ci/words
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: venv  ## put the code in shape
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

wheel: venv  ## build dist/*.whl
	@$(BIN)/python -m build --wheel --no-isolation

ci:         ## what .ci/run does
	@.ci/run

clean:      ## remove what builds and checks leave behind; keeps .venv and runs
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf *.egg-info
