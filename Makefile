# PYTHON chooses the interpreter of the environment, for example `PYTHON=python3.12 make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Touched last, so that an interrupted installation starts over.
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed_docs

.DELETE_ON_ERROR:
.PHONY: help venv demo test check lint docs faults models release-check clean

help:
	@echo "make demo    distil a small model over two CPU processes"
	@echo "make test    lint, types and the whole test suite"
	@echo "make check   lint, types and the fast tests"
	@echo "make faults  everything that can fail, many times; writes the table of docs/failure.md (an hour)"
	@echo "make models  models of torchvision and timm, divided and trained; writes the tables of docs/models.md"
	@echo "make lint    ruff and mypy alone"
	@echo "make docs    the pages in docs/_build/html, warnings as errors"
	@echo "make release-check  builds sdist and wheel, installs the wheel anew and runs the smallest example"
	@echo "make venv    the environment that the others use, in $(VENV)"
	@echo "make clean   remove everything that was built, the environment included"

venv: $(INSTALLED)

# torch and torchvision must be built for each other, so one resolution chooses both.
$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off torch torchvision -e ".[test]"
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[docs]"
	touch $@

demo: venv
	$(BIN)/python examples/digits.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not spawn and not slow and not gpu"

# Two at a time: much of the suite waits for processes. By files, whose fixtures train references.
test: lint
	$(BIN)/python -m pytest -n 2

docs: $(INSTALLED_DOCS)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

# In an environment with nothing but the wheel and what it asks for; the example's own needs are one extra of it.
release-check:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --disable-pip-version-check --progress-bar off build
	build/release/bin/python -m build --outdir dist
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install --disable-pip-version-check --progress-bar off torch torchvision \
		"$$(ls $(CURDIR)/dist/*.whl)[examples]"
	cp examples/minimal.py build/release/
	cd build/release && env -u PYTHONPATH bin/python -c "import lightning_pipebd, pathlib; \
		assert 'site-packages' in pathlib.Path(lightning_pipebd.__file__).parts, lightning_pipebd.__file__"
	cd build/release && env -u PYTHONPATH bin/pipebd --help > help.txt
	cd build/release && env -u PYTHONPATH OMP_NUM_THREADS=1 bin/python minimal.py

faults: venv
	NUM_CORRUPTIONS=500 $(BIN)/python -m pytest tests/test_checkpoint_io.py -k corrupted
	OMP_NUM_THREADS=1 $(BIN)/python -m faults

# timm is wanted here alone.
models: venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off timm
	OMP_NUM_THREADS=1 $(BIN)/python -m zoo

clean:
	rm -rf $(VENV) build dist docs/_build docs/_figures .mypy_cache .pytest_cache .ruff_cache .hypothesis lightning_logs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
