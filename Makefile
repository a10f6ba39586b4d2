# Everything runs in a virtual environment of the checkout; the only needs are python3, its venv module, make
# and a package index that pip can reach.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint conformance bench soak clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/fabric replay examples/virtio-blk-2cpu.txt.gz --board arm64-gicv3 --vcpus 16

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not soak'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the interface inventory promises, and which tests claim it; fails on what none does.
conformance: $(STAMP)
	$(BIN)/fabric conformance

bench: $(STAMP)
	$(BIN)/python bench/msi_storm.py
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/ioctl_cost.py

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
