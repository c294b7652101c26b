# demo: set up and run the main job.  test: set up and test.  check: lint, types, format.  bench: the measured tables.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
# where pip would bring a CUDA build of torch: make test TORCH_OPTIONS="--index-url ..." with the index of CPU builds
TORCH_OPTIONS ?=
# tests in parallel processes, each with one thread; a file runs in one process
PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PROCESSES) --dist loadfile

.PHONY: demo test test-all check matrix bench clean

demo: $(STAMP)
	$(PY) -m arrowhead demo --out demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# docs/combinations.md, from what tests/combinations state
matrix: $(STAMP)
	PYTHONPATH=tests $(PY) tests/combinations/matrix.py

bench: $(STAMP)
	$(PY) benchmarks/attention.py
	@echo "the quality table needs networks and data: see benchmarks/README.md"

# torch first and pinned: anything else would pull a CUDA build of several gigabytes
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt $(TORCH_OPTIONS) torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
