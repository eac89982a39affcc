# From a clean checkout, with Python >= 3.11 and make and nothing else: `make demo`, `make test`, `make check`.

.DEFAULT_GOAL := help
.PHONY: help venv demo test check format bench clean python

# The first Python on the PATH that is new enough; `make PYTHON=/path/to/python3 ...` to choose.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Each test worker starts servers of its own; two keep two cores busy.
WORKERS ?= 2
PYTEST_ARGS ?=

help:
	@echo "make demo     run transitions, kill Valkey, recover, and check every claim (embedded Valkey and SQLite)"
	@echo "make test     the whole test suite, against real Valkey and PostgreSQL processes"
	@echo "              (PYTEST_ARGS='--server redis8 -k name' for others or fewer, WORKERS=n)"
	@echo "make check    format, lint, types, layers"
	@echo "make format   let ruff put the format right"
	@echo "make crash    only the tests in which processes die, at every point"
	@echo "make mutants  put in the mistakes of the trade one at a time: a test must catch each"
	@echo "make matrix   a short form of the tests on the other servers"
	@echo "make bench    the benchmarks, beside their peers, in a quarter of an hour (BENCH_ARGS='--only NAME', '--full')"
	@echo "make venv     only the virtual environment, in $(VENV)"
	@echo "make clean    remove it and every cache"

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/statecache demo

test: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.installed-for-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-for-development
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# BENCH_ARGS="--only hot", "--full", "--list"; docs/performance.md.
BENCH_ARGS ?=
bench: $(VENV)/.installed-for-development
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { echo "statecache needs Python 3.11 or newer: none found on the PATH." \
		"Install one, or say which: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "statecache needs Python 3.11 or newer:" \
		"$(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; exit 1; }

$(BIN)/python: | python
	"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); echo "Python's venv module does not work here" \
		"(on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }

# Marks the last installation: made again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(PIP) install --editable .
	@: > $@

$(VENV)/.installed-for-development: pyproject.toml $(BIN)/python
	$(PIP) install --editable '.[test,check,bench]'
	@: > $(VENV)/.installed; : > $@

# Chaos: real servers and client processes, seeded faults, judged from the clients' ledgers (docs/testing.md).
.PHONY: chaos
SEED ?=
MINUTES ?= 5
SQL ?= sqlite
SERVER ?= valkey9
AOF ?= everysec
CHAOS_ARGS ?=
chaos: $(VENV)/.installed-for-development
	$(BIN)/python -m tests.chaos --seed "$(SEED)" --minutes $(MINUTES) --sql $(SQL) --server $(SERVER) --aof $(AOF) $(CHAOS_ARGS)

.PHONY: crash mutants matrix

# The processes of the project die, fail, hang and are stopped at every point; docs/testing.md, 1 and 5.
crash: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/crash $(PYTEST_ARGS)

# One mistake at a time is put into a copy of the code, and must be caught; MUTANTS="word word" tries some of them.
MUTANTS ?=
mutants: $(VENV)/.installed-for-development
	$(BIN)/python -m tests.mutants --workers $(WORKERS) $(MUTANTS)

# The short form of the suites on the other servers of the wheels.
SERVERS ?= valkey8 redis8
matrix: $(VENV)/.installed-for-development
	for server in $(SERVERS); do \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --server $$server -m "not postgres" $(PYTEST_ARGS) \
			-k "not failing_there and not hanging_there and not going_on_there" \
			tests/lua tests/integration/test_holes.py tests/integration/test_faults_client.py \
			tests/integration/test_durability.py tests/crash/test_failpoints.py || exit 1; \
	done

.PHONY: cold
# 1,000,000 instances, room for 100,000 in Redis: a mixed load, judged by a ledger (takes minutes); docs/testing.md.
COLD_ARGS ?=
cold: $(VENV)/.installed-for-development
	$(BIN)/python -m tests.scale $(COLD_ARGS)

.PHONY: model
# Every interleaving of the protocol; docs/testing.md, 9.
model: $(VENV)/.installed-for-development
	$(BIN)/python -m tests.model --large

# One instrument each; docs/testing.md, 2, 4 and 6.
.PHONY: property failover power-loss
property: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest tests/property $(PYTEST_ARGS)
failover: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest tests/integration/test_failover.py $(PYTEST_ARGS)
power-loss: $(VENV)/.installed-for-development
	$(BIN)/python -m pytest tests/integration/test_power_loss.py $(PYTEST_ARGS)
