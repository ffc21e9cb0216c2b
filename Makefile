# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
# With an NVIDIA GPU, the environment uses the torch of $(PYTHON); otherwise it installs the CPU build.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(GPU),constraints.txt,constraints-cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-cluster test-torch test-long gpu-check lint docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/torch: constraints.txt constraints-cpu.txt
	$(PYTHON) -m venv $(if $(GPU),--system-site-packages) $(VENV)
	$(if $(GPU),,$(PIP) install --quiet -c $(CONSTRAINTS) torch)
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## install, train on two ranks for a few minutes, generate a grid of images
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 diffmoe_ds/train.py --run-dir $(DEMO)
	$(BIN)/diffmoe sample --checkpoint $(DEMO) --num-images 60 --steps 25 --cfg-scale 3 --out $(DEMO)/drawn
	@echo; echo "Images: $(abspath $(DEMO))/drawn/grid.png"
	@echo "Curves: $(BIN)/tensorboard --logdir runs"

# One test compares with torch-fidelity, which needs torchvision. The PyPI build of torchvision cannot be imported next
# to the CPU build of torch, and diffusers and transformers import it if they find it, so it is installed separately.
$(VENV)/installed-inception: $(VENV)/installed-dev
	rm -rf $(VENV)/inception
	$(PIP) install --quiet --no-deps -c $(CONSTRAINTS) --target $(VENV)/inception torch-fidelity torchvision
	touch $@

test: $(VENV)/installed-inception test-fast  ## all tests that run on one host
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not cluster and not long"

test-fast: $(VENV)/installed-dev  ## only the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"

$(VENV)/installed-cluster: $(VENV)/installed-dev
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[cluster]'
	touch $@

test-cluster: $(VENV)/installed-cluster  ## tests on four simulated hosts: ssh, Slurm, Open MPI; root installs packages
	tests/cluster/install.sh
	$(BIN)/python -m pytest -n 2 --dist loadgroup -rs -m "cluster and not long"

# The environment stays; `make clean` removes it.
test-torch:  ## golden, seam and layout tests with another torch: make test-torch TORCH=2.15.0
	$(if $(TORCH),,$(error set TORCH, for example TORCH=2.15.0))
	$(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet -c constraints.txt torch==$(TORCH) -e '.[dev]'
	$(VENV)-torch-$(TORCH)/bin/python -m pytest -m "not long" tests/golden tests/distributed/test_seam.py \
		tests/distributed/test_layout.py

test-long: $(VENV)/installed-dev  ## tests that take hours: 1,000 faults, resume matrix, process exits
	$(BIN)/python -m pytest -m long

gpu-check:  ## GPU tests and benchmarks with $(PYTHON) on one GPU: 15 minutes, no network, installs nothing
	$(PYTHON) -m benchmarks.gpu_check --out gpu_check.json

lint: $(VENV)/installed-dev  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## regenerate docs/configuration.md
	$(BIN)/diffmoe config --markdown >docs/configuration.md.tmp
	mv docs/configuration.md.tmp docs/configuration.md

clean:  ## remove the environment, build products and caches
	rm -rf $(VENV) $(VENV)-torch-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
