# Needs Python >= 3.11 and make, nothing else. Everything is installed into .venv at the first call.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin

.PHONY: demo test lint types wheel bench clean help

help:
	@echo "make demo    walk through the shipped world; render a smaller one, fit it, write runs/demo/report.html (eight minutes, two cores)"
	@echo "make test    run the tests"
	@echo "make lint    check style            make types   check types"
	@echo "make wheel   build the wheel and try it away from the checkout"
	@echo "make bench   list the benchmarks"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.12")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(RUN)/relic demo --out runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "not slow and not gpu" -n 2

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(STAMP)
	$(RUN)/mypy

wheel: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m slow tests/test_wheel.py

bench:
	@for script in benchmarks/*.py; do printf '%-32s ' $$script; sed -n '1s/"""//gp' $$script; done

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
