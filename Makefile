# Every target makes .venv (once, and again when its dependencies change) and works on a clean clone.
#   make demo       the whole thing on a Llama-type model
#   make test       the tests that CI runs        make test-all   the slow ones too
#   make check      ruff, formatter, mypy         make fix        what ruff can mend by itself
#   make bench      benchmarks, results as JSON into benchmarks/results/
#   make gpu        tests, then benchmarks, on a CUDA device; under 10 minutes, goes on where it stopped
#   make coverage   how many of the attentions of 140 architectures are understood; hours, goes on where it stopped
#   make docs       docs/remarks.md, from the table of codes
# PYTHON=python3.12 picks the interpreter the environment is made with (3.11 or later).
# ARGS="..." is handed to the demo, the benchmarks or pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check fix bench coverage gpu docs clean

help:
	@sed -n 's/^#   //p' Makefile

# A failed install leaves no stamp, so the next call tries again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

# Kernels run in Triton's interpreter, which wants a process of its own.  What ARGS picks may have no test in one of the two.
NONE_IS_FINE = $(if $(ARGS),|| [ $$? -eq 5 ])

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS) $(NONE_IS_FINE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS) $(NONE_IS_FINE)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS) $(NONE_IS_FINE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(ARGS) $(NONE_IS_FINE)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

# timm wants torchvision, beside whose wheel transformers cannot be imported: where only the zoo looks for them.
ZOO := $(VENV)/zoo
$(ZOO)/.installed: $(STAMP) constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade --no-deps --target $(ZOO) \
	    $(shell grep -E '^(timm|torchvision|pillow)==' constraints.txt)
	touch $@

coverage: $(ZOO)/.installed
	PYTHONPATH=$(ZOO) $(BIN)/python -m tests.zoo.coverage $(ARGS)

# On a machine with a GPU and no network: what is installed there has to do. Results go to $$OUT too, if that is set.
gpu:
	OUT="$${OUT:-.}" PYTHON="$(PYTHON)" benchmarks/gpu/run

docs: $(STAMP)
	$(BIN)/python docs/remarks.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
