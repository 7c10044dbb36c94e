# Everything a bare machine with Python 3.11+, pip, venv and make needs. `make demo` and `make test` set up first.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

TORCH_BENCHES := highway_rnn ldb_saving dbp_overhead ddg_speed highway_deep loop_overhead ddg_memory

.PHONY: help setup demo test check quick lint types bench bench-torch clean
help:
	@echo "make demo    sweep five arms on the digits and show the Pareto report (minutes)"
	@echo "make test    the whole test suite"
	@echo "make check   what CI runs: all but the longest tests"
	@echo "make quick   the tests that take seconds"
	@echo "make lint    ruff;  make types  basedpyright;  make bench  speed claims, as ratios"
	@echo "make bench-torch  those that need torch alone, with PYTHON as it is: for a machine with a GPU and nothing else"

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $@")'
	test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	touch "$(STAMP)"

demo: $(STAMP)
	"$(BIN)/fastbp-sweep" run quickstart

test: $(STAMP)
	"$(BIN)/python" -m pytest -n $(JOBS) --dist worksteal

check: $(STAMP)
	"$(BIN)/python" -m pytest -n $(JOBS) --dist worksteal -m "not long"

quick: $(STAMP)
	"$(BIN)/python" -m pytest -m "not slow"

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(STAMP)
	"$(BIN)/basedpyright" --pythonpath "$(BIN)/python" --level error

bench: $(STAMP)
	@failed=; for script in benchmarks/*.py; do "$(BIN)/python" "$$script" || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "claims that do not hold, or errors:$$failed"; exit 1; }

bench-torch:
	@failed=; for name in $(TORCH_BENCHES); do PYTHONPATH=. PYTHONUNBUFFERED=1 "$(PYTHON)" benchmarks/$$name.py || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "claims that do not hold, or errors:$$failed"; exit 1; }

clean:
	rm -rf "$(VENV)" build *.egg-info
