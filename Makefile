# PYTHON chooses the interpreter of the environment, for example `PYTHON=python3.12 make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Touched last, so that an interrupted installation starts over.
INSTALLED := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help venv demo test check lint faults clean

help:
	@echo "make demo    distil a small model over two CPU processes"
	@echo "make test    lint, types and the whole test suite"
	@echo "make check   lint, types and the fast tests"
	@echo "make faults  everything that can fail, many times; writes the table of docs/failure.md (an hour)"
	@echo "make lint    ruff and mypy alone"
	@echo "make venv    the environment that the others use, in $(VENV)"
	@echo "make clean   remove everything that was built, the environment included"

venv: $(INSTALLED)

# torch and torchvision must be built for each other, so one resolution chooses both.
$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off torch torchvision -e ".[test]"
	touch $@

demo: venv
	$(BIN)/python examples/digits.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not spawn and not slow and not gpu"

test: lint
	$(BIN)/python -m pytest

faults: venv
	NUM_CORRUPTIONS=500 $(BIN)/python -m pytest tests/test_checkpoint_io.py -k corrupted
	OMP_NUM_THREADS=1 $(BIN)/python -m faults

clean:
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis lightning_logs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
