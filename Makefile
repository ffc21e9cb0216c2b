# make demo   install into .venv, train on two ranks, draw a grid
# make test   install what the tests need and run them all
# make lint   style and formatting
# make test-cluster   four hosts on this machine: ssh, Slurm, Open MPI; installs their packages when root
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
# A machine with an NVIDIA GPU keeps the torch that $(PYTHON) has; any other gets the CPU build.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(GPU),constraints.txt,constraints-cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-fast test-cluster lint clean

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

demo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 diffmoe_ds/train.py --run-dir $(DEMO)
	$(BIN)/diffmoe sample --checkpoint $(DEMO) --num-images 60 --steps 25 --cfg-scale 2 --out $(DEMO)/drawn
	@echo; echo "The picture: $(abspath $(DEMO))/drawn/grid.png"
	@echo "The curves:  $(BIN)/tensorboard --logdir runs"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m "slow and not cluster"

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

$(VENV)/installed-cluster: $(VENV)/installed-dev
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[cluster]'
	touch $@

test-cluster: $(VENV)/installed-cluster
	tests/cluster/install.sh
	$(BIN)/python -m pytest -rs -m cluster

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
