# Two commands for a newcomer, each of which sets up all it needs: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests in a process a core; more than four would want too much memory. `worksteal` keeps neighbours in one process,
# so that what a file sets up is set up once.
export PYTEST_ADDOPTS := --numprocesses=logical --maxprocesses=4 --dist=worksteal

NATIVE := CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test checks lint matrix-releases test-newest test-matrix test-sanitized clean

demo: $(VENV)/.installed
	$(BIN)/chatglm-ov demo

test: checks test-newest test-matrix test-sanitized

# One needs a core, the other the network.
checks: $(VENV)/.installed-dev
	$(MAKE) --jobs=2 lint matrix-releases

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-newest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# Older releases of transformers, from the oldest that the package supports, in front of the same torch and OpenVINO.
matrix-releases: $(VENV)/.installed-dev
	tests/matrix.sh --install

test-matrix: $(VENV)/.installed-dev
	tests/matrix.sh

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

clean:
	rm -rf $(VENV) .matrix build
