# make quickstart   installs, trains on scikit-learn's digits and evaluates: about 2.5 minutes on two CPU cores
# make test         installs and runs lint and the tests
# make test-long    tests whole runs: killed, out of disk space, or on several processes
# make lint         runs ruff, mypy and import-linter
# make install      installs only
# PYTHON=python3.12 make ... selects the interpreter, 3.11 or newer

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install quickstart test test-long lint

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python train.py --config configs/digits.py
	$(BIN)/python eval.py --workdir runs/digits

test: $(VENV)/.tested lint
	$(BIN)/python -m pytest

test-long: $(VENV)/.tested
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: PYTHON=python3.12 make ...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(VENV)/.installed $@
