# Two commands for a fresh machine: `make run` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
ARGS ?=
BIN = .venv/bin

.PHONY: install run test lint types check format

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: install
	$(BIN)/python run.py $(ARGS)

# One thread per worker: with more, two workers on two cores wait for each other. Files stay whole, so that what their tests share
# is made once.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
