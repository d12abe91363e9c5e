# Two commands: `make demo` renders a picture, `make test` runs the whole test suite.
# Both make their own virtual environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt

.PHONY: demo test

demo: $(VENV)/demo.stamp
	$(BIN)/python -m chroma_nodes run workflows/api/chroma-small.json --out output

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: where it is there already, nothing else asks for another build of it.
$(VENV)/demo.stamp: pyproject.toml tests/constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e ".[standalone]"
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e ".[standalone,test]"
	touch $@
