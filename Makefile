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
.PHONY: help demo test test-fast test-cluster test-torch test-long gpu-check lint docs lock audit clean

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

$(VENV)/installed-lock: constraints.txt
	rm -rf $(VENV)/lock
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt uv pip-audit
	touch $@

# requirements.txt has one line for each version that any Python from 3.10 to 3.13 gets, with the hashes of all its
# files. torch and the packages that only torch needs are left out: machines differ in their build of torch.
# The packages are unpacked for the oldest and the newest Python to read their licenses.
lock: $(VENV)/installed-lock  ## regenerate requirements.txt (hashes) and docs/licenses.md from constraints.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.10 \
		--generate-hashes --no-annotate --no-emit-package colorama --constraint constraints-cpu.txt \
		--override <(echo "torch; python_version < '0'") --output-file requirements.txt pyproject.toml
	rm -rf $(VENV)/licenses
	for python in 3.10 3.13; do $(VENV)/lock/bin/uv pip install --quiet --no-deps --require-hashes \
		--python-version $$python --target $(VENV)/licenses/$$python -r requirements.txt || exit; done
	$(PYTHON) -m tools.list_licenses $(VENV)/licenses/3.10 $(VENV)/licenses/3.13 >docs/licenses.md.tmp
	mv docs/licenses.md.tmp docs/licenses.md

audit: $(VENV)/installed-lock  ## look up known vulnerabilities of requirements.txt with pip-audit; needs access to PyPI
	@$(VENV)/lock/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.txt || { echo "make audit:" \
		"either pip-audit listed vulnerabilities above, or it could not look up every package, for example without" \
		"network or behind a package mirror; run it on a machine with access to PyPI." >&2; exit 1; }

clean:  ## remove the environment, build products and caches
	rm -rf $(VENV) $(VENV)-torch-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
