# Every target does the set-up it needs and says what it is doing; the second time the set-up takes no time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := smollm2-135m-instruct
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install the project with its development tools

$(STAMP): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Dendrite needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11"; exit 1; }
	@echo "==> Making the virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Python's venv module does not work here; on Debian and Ubuntu it is the package python3-venv."; exit 1; }
	@echo "==> Installing Dendrite and its development tools (several minutes and 1.5 GB the first time)"
	@$(BIN)/python -m pip install --progress-bar on --constraint constraints-dev.txt --editable '.[dev]'
	@touch $(STAMP)
	@echo "==> Set up: $(BIN)/dendrite"

demo: setup ## watch a real model search a tree
	@echo "==> Running 'dendrite demo' (fetches $(MODEL), 93 MB, the first time)"
	@$(BIN)/dendrite demo

test: setup ## run all tests, those on the real model too
	@echo "==> Fetching $(MODEL), the model that the tests run (93 MB the first time)"
	@$(BIN)/dendrite models fetch $(MODEL)
	@echo "==> Running the tests; what is skipped is listed at the end, with the reason"
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

check: setup ## everything CI checks besides the tests
	@echo "==> ruff: rules and formatting"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "==> mypy: strict types"
	@$(BIN)/mypy
	@echo "==> import-linter: layers"
	@$(BIN)/lint-imports --no-logo
	@echo "==> codespell: spelling"
	@$(BIN)/codespell
	@echo "==> mkdocs: the documentation builds without a warning"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup ## serve the documentation on this machine
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## remove the environment, the caches and what was built
	rm -rf $(VENV) site build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
