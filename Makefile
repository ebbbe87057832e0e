# hvmgr: `make help` lists what there is. Every target that needs them brings the Debian packages and the virtual
# environment first (.ci/setup), as root or through sudo; when nothing is missing that costs nothing.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 3
PYTEST  ?=
BENCH   ?=
PREFIX  ?= /opt/hvmgr
LINK    ?= /usr/local/bin/hvmgr

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
# Each process that a test starts would compile all of hvmgr anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup install test lint format demo bench clean

run := $(VENV)/bin/python -m

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## */\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  PYTHON=python3.12   the Python that makes $(VENV) (3.11 or later; after make clean)'
	@echo '  WORKERS=3           test processes'
	@echo '  PYTEST="-k merge"   what pytest gets besides'
	@echo '  BENCH="inside vhd"  the suites of bench/ that are measured (all)'
	@echo '  PREFIX=/opt/hvmgr   where make install puts it, LINK=/usr/local/bin/hvmgr what is in PATH'

setup:  ## Debian packages and the virtual environment
	@.ci/setup "$(VENV)" "$(PYTHON)"

install:  ## hvmgr for this host in PREFIX, with what it takes to run it and no more; as root, again for an upgrade
	@.ci/install "$(PREFIX)" "$(LINK)" "$(if $(findstring file,$(origin PYTHON)),/usr/bin/python3,$(PYTHON))"

test: setup  ## the whole check: format, lint, types, tests
	@$(MAKE) --jobs=2 lint tests/__pycache__
	@.ci/test $(VENV)/bin/python $(WORKERS) $(PYTEST)

# On a fresh tree pytest translates all tests first, and libvirt asks QEMU what it can do, 8 s long; done here, beside the
# types, no test process has to do it again.
tests/__pycache__: | setup
	@$(run) tests.private_libvirt .pytest_cache/d/libvirt-capabilities >/dev/null 2>&1 || true
	@$(run) pytest --collect-only -p no:cacheprovider >/dev/null 2>&1 || true

lint: setup  ## format, lint and types only
	@$(run) ruff format --check . || { echo 'make format puts this right' >&2; exit 1; }
	@$(run) ruff check .
	@$(run) mypy

format: setup  ## formats the code, mends what ruff can mend
	@$(run) ruff format .
	@$(run) ruff check --fix .

demo: setup  ## a guided tour with a real guest, no libvirt daemon needed
	@$(VENV)/bin/hvmgr demo

bench: setup  ## measures the promises of speed against the usual tools
	@.ci/setup "$(VENV)" "$(PYTHON)" virtinst virtnbdbackup mmdebstrap
	@exec $(run) bench $(BENCH)

clean:  ## removes the virtual environment, caches and build products; Debian packages stay
	rm -rf -- $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf -- {} +
