# make demo       pretrain on the embedded digits, go on with and without mining: a table, a report
# make lint       the form of the code: ruff check, ruff format (make format mends what it can)
# make test       the whole suite but the tests marked slurm or long
# make test-long  those that are long: the GPU pack's rehearsal, and what compiles for long
# make test-slurm those on a SLURM of two nodes, installed (Debian, as root) and started here
# make docs       the pages of docs/ as a site in site/; a broken link or anchor fails
# make bench      measure what this machine can (CPU: some minutes; GPU: all of it, 8 minutes) and
#                 write benchmarks/RESULTS.md
# make gpu IMAGES=cifar10.tar.gz OUT=dir
#                 nine minutes on a GPU: proof, figures, training (GPU_FLAGS=--quick rehearses it on
#                 a CPU)
# TEST_PROCESSES=n   how many files of tests make test runs side by side (2)
# VENV=dir           use (or make) this virtual environment instead of .venv
# PYTHON=python3.12  make it with another Python

VENV ?= .venv
PYTHON ?= python3
SEEDS ?= 1
TEST_PROCESSES ?= 2
MINUTES ?= 60
OUT ?= runs/gpu
PY := $(VENV)/bin/python

demo: $(VENV)/.installed
	$(PY) -m studies.demo --seeds $(SEEDS)

test: $(VENV)/.installed
	$(PY) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile -m "not slurm and not long" tests

test-long: $(VENV)/.installed
	$(PY) -m pytest -q -m long tests

test-slurm: $(VENV)/.installed
	$(PY) -m pytest -q -m slurm tests/slurm

bench: $(VENV)/.installed
	$(PY) -m benchmarks.bench --minutes $(MINUTES)

gpu: $(VENV)/.installed
	PYTHON=$(PY) benchmarks/gpu.sh $(IMAGES) $(OUT) $(GPU_FLAGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable '.[docs]'
	touch $@

.PHONY: docs lint format demo test test-long test-slurm bench gpu install
