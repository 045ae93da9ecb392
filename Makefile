# make quickstart   install, then run pipelines/quickstart.yaml: raw text to a served model
# make test         install with the test extras, lint, then every test
# make bench        every benchmark, or one: make bench NAME=corpus_minhash

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RECIPE ?= pipelines/quickstart.yaml
# Two processes, a file of tests in one of them: module fixtures are made once, and waiting overlaps.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --durations 30
export HF_HUB_OFFLINE ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help install install-test quickstart test lint format bench bench-env lock clean

help:
	@grep '^# make' Makefile | sed 's/^# //'

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# A stamp a lock file: pip runs again only when the lock or the metadata changed.
$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/.python
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --editable .
	touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	$(PIP) install --quiet --requirement requirements-test.lock
	touch $@

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

quickstart: install
	$(BIN)/modelyard run $(RECIPE)

test: install-test lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-env: .venv-bench/.installed

.venv-bench/.installed: tests/benchmarks/requirements.txt tests/benchmarks/requirements-nodeps.txt requirements.lock
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --requirement tests/benchmarks/requirements.txt
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement tests/benchmarks/requirements-nodeps.txt
	touch $@

bench: install-test
	$(BIN)/python tests/benchmarks/run.py $(NAME)

# Ranges live in pyproject.toml; this writes the exact versions. The CPU build of torch is what a
# lock can name; `+cpu` is dropped so that the same file serves a CUDA machine.
lock: install
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --python-version 3.11 --no-header --no-annotate --quiet \
		--extra s3 $(LOCK_ARGS) --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --python-version 3.11 --no-header --no-annotate --quiet \
		--extra s3 --extra test --extra dev --constraint requirements.lock $(LOCK_ARGS) --output-file requirements-test.lock
	sed -i 's/+cpu$$//' requirements.lock requirements-test.lock

clean:
	rm -rf $(VENV) .venv-bench .mypy_cache .ruff_cache
