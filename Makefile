# Everything runs inside .venv, which tools/setup_environment.py makes and keeps up to date.
#   make env PYTHON=python3.12                    another interpreter
#   make env DETECTRON2_SOURCE=../detectron2      another Detectron2 (any pip requirement)
#   make env ENV_OPTIONS=--system-site-packages   keep the packages of the interpreter

PYTHON ?= python3
VENV ?= .venv
ENV_OPTIONS ?=
# Of pip-audit, such as --ignore-vuln ID for one that does not concern this project.
AUDIT_OPTIONS ?=
VENV_PYTHON := $(VENV)/bin/python
PYTEST_OPTIONS ?=
# Test processes at a time; each works on one thread, or they would wait for one another.
PYTEST_WORKERS ?= auto
# Optional parts that tests use, where they can be had; "app" (gradio, some 35 packages) is another.
TEST_PARTS ?= crf export
test test-quick: export OMP_NUM_THREADS ?= 1
PYTEST := $(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) --maxprocesses 8 --dist worksteal
# What the static scan for insecure code reads.
SCANNED := projects tools benchmarks train_net.py
# Asked for one package first: a build must not depend on whether a service answers.
AUDIT := $(VENV_PYTHON) -m pip_audit --progress-spinner off $(AUDIT_OPTIONS)
SETUP := $(PYTHON) tools/setup_environment.py --venv $(VENV)

.DEFAULT_GOAL := help
.PHONY: help env demo demo-short test test-quick lint audit clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make .venv: pinned packages, Detectron2 and this project
	@$(SETUP) $(ENV_OPTIONS)

demo: env  ## the whole path on the demo dataset: train, evaluate, draw (CPU, minutes)
	$(VENV)/bin/tsmask demo --output-dir output/demo

demo-short: env  ## the demo in a few steps, to see that it runs
	$(VENV)/bin/tsmask demo --short --output-dir output/demo-short

test:  ## the whole test suite
	@$(SETUP) $(ENV_OPTIONS) --with $(TEST_PARTS)
	@$(VENV)/bin/tsmask --version
	$(PYTEST) $(PYTEST_OPTIONS)

test-quick: env  ## the unit tests, without whole trainings and programs
	@$(VENV)/bin/tsmask --version
	$(PYTEST) -m "not slow" $(PYTEST_OPTIONS)

lint: env audit  ## black, isort, flake8, bandit and the audit, without changing a file
	$(VENV_PYTHON) -m black --quiet --check --diff .
	$(VENV_PYTHON) -m isort --check --diff .
	$(VENV_PYTHON) -m flake8 .
	$(VENV_PYTHON) -m bandit --quiet --configfile pyproject.toml --recursive $(SCANNED)

audit: env  ## known vulnerabilities of the installed packages; passes where there are no data
	@probe=$$(echo numpy==2.2.6 | $(AUDIT) --no-deps --disable-pip -r /dev/stdin 2>&1); \
	case "$$probe" in \
	    *"could not be audited"*) echo "NOT AUDITED: the package index has no data" ;; \
	    *"known vulnerabilit"*) $(AUDIT) --local --skip-editable ;; \
	    *) echo "NOT AUDITED: no data can be reached"; echo "$$probe" | tail -n 1 ;; \
	esac

clean:  ## remove outputs and caches (the environment stays)
	rm -rf output build dist .pytest_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
