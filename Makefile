# Every target makes .venv when there is none. `make PYTHON=python3.12 ...` picks the Python it is made with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.installed
# Two workers suit the two-core machines CI has; a test file stays in one worker, so that its fixtures are made once.
PYTEST := $(RUN) pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: help demo test test-all fuzz lint format

help:
	@echo "make demo      train, evaluate and show a first agent with the bundled LLM; results go to runs/"
	@echo "make test      what CI runs: all tests but the slow ones"
	@echo "make test-all  all tests, and ten times as many examples of bad input"
	@echo "make fuzz      bad input by the thousand, and how many examples were tried"
	@echo "make lint      ruff, codespell and mypy"
	@echo "make format    let ruff fix and format"

demo: $(READY)
	$(RUN) experiments.demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	KVENV_FUZZ=10 $(PYTEST)

fuzz: $(READY)
	KVENV_FUZZ=20 $(PYTEST) --dist=load tests/fuzz

lint: $(READY)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) codespell_lib
	$(RUN) mypy

format: $(READY)
	$(RUN) ruff check --fix
	$(RUN) ruff format

# The constraints pin PyTorch too: an open range would take the newest CUDA build where a CPU build is at hand.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kvenv needs Python 3.10 or newer: make PYTHON=python3.x")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
