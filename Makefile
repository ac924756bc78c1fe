# make setup | test | lint | demo | clean
export OMP_WAIT_POLICY = PASSIVE

PYTHON ?= python3
BIN := .venv/bin
DEV := .venv/.installed-dev
RUN := .venv/.installed-all
# What an installation depends on: an editable one compiles the native kernels too.
BUILT := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.DEFAULT_GOAL := setup
.PHONY: setup test lint demo clean

setup: $(DEV)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A complete development environment serves the demo too.
demo: $(if $(wildcard $(DEV)),$(DEV),$(RUN))
	$(BIN)/hashattention demo

$(DEV): $(BUILT) | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@

$(RUN): $(BUILT) | $(BIN)/python
	$(PIP) -e '.[all]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
