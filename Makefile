# make demo   set up what the command line needs and run the main job, flatmin compare
# make test   set up and run what CI runs: lint, types, tests
# make gpu    laws, memory and speed on CUDA and NCCL, on a machine with a GPU
# make docs   write the generated table of methods, docs/methods.md
# make mutants  change the core in 200 places, one at a time: which changes does no test notice?
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test gpu mutants docs lint types clean

help:
	@sed -n 's/^# make/make/p' Makefile

.venv/installed: pyproject.toml constraints.txt peers.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt -r peers.txt
	touch $@

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cli]'
	touch $@

demo: .venv/demo
	$(BIN)/flatmin compare

test: .venv/installed lint types
	$(BIN)/python -m pytest -n 2

gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

mutants: .venv/installed
	$(BIN)/python tests/mutants.py

docs: .venv/installed
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_measures.py

lint: .venv/installed
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/pyright

clean:
	rm -rf .venv .mutants .pytest_cache .ruff_cache .hypothesis
