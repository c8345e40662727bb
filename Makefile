# Two commands for a newcomer, each of which sets up all it needs: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .matrix/transformers-oldest

NATIVE := CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint test-newest test-oldest test-sanitized clean

demo: $(VENV)/.installed
	$(BIN)/chatglm-ov demo

test: lint test-newest test-oldest test-sanitized

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-newest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# The oldest transformers that the package supports, in front of the same torch and OpenVINO.
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -m transformers_matrix

# The native library once more, with AddressSanitizer and UndefinedBehaviorSanitizer, under its own tests.
test-sanitized: $(VENV)/.installed-dev
	tests/sanitized.sh $(BIN)/python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# Not after .installed: each of the two builds the native library.
$(VENV)/.installed-dev: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed $@

$(OLDEST)/.installed: requirements-oldest.txt | $(VENV)/.installed-dev
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) --requirement requirements-oldest.txt
	touch $@

clean:
	rm -rf $(VENV) .matrix build
