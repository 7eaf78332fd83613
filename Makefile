# Two commands on a fresh machine: `make quickstart`, `make test`. Both set up `.venv` first where it is absent.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# Tests run in one process more than there are cores, one thread each: some wait for servers and signals.
JOBS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 1)))

.PHONY: setup quickstart test check format bench torture docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
ifeq ($(UV),)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "WMTP needs Python 3.11 or newer; try: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
else
	test -x $(BIN)/python || $(UV) venv --quiet --python '>=3.11' $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
endif
	@touch $@

quickstart: setup  ## train, generate, execute and compare three algorithms, in minutes
	$(BIN)/wmtp quickstart

test: setup  ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: setup  ## lint, format, types, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/check_layout.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

torture: setup  ## the slow tests: the quickstart's results, all benchmark references, faults
	$(BIN)/python -m pytest -m slow -q

bench: setup  ## side-by-side measurements
	for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

docs: setup  ## pages that are generated from the code
	$(BIN)/python scripts/write_docs.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
