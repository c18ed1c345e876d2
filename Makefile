# make demo   sets everything up and runs the demo
# make test   sets everything up and runs every check
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format types unit install clean

demo: $(INSTALLED)
	$(BIN)/captum-transformer-attr demo

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

# One thread per worker: the models in the tests are tiny, and threads of several workers would only wait for each other.
unit: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

install: $(INSTALLED)

# Made again only when pyproject.toml is newer, so that a second `make test` calls no pip.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
