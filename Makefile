# Two commands for a newcomer, each of which sets up all it needs: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .matrix/transformers-oldest

.PHONY: demo test lint test-newest test-oldest clean

demo: $(VENV)/.installed
	$(BIN)/chatglm-ov demo

test: lint test-newest test-oldest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-newest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# The oldest transformers that the package supports, in front of the same torch and OpenVINO.
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -m transformers_matrix

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml CMakeLists.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: requirements-oldest.txt | $(VENV)/.installed-dev
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) --requirement requirements-oldest.txt
	touch $@

clean:
	rm -rf $(VENV) .matrix build
