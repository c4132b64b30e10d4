# make demo: set up and run the embedded default.  make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: demo test lint quick clean

demo: $(VENV)/ready
	dvc repro
	@cat artifacts/report/metrics.md

test: $(VENV)/ready
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadfile

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	mypy

quick: $(VENV)/ready
	tests/quick.sh

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older; try make PYTHON=python3.12"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf artifacts dvc.lock
