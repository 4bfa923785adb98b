# `make` prints the targets. All of them but help and clean set up what they need by themselves.

VENV   ?= .venv
# NumPy to install, e.g. NUMPY='numpy<2'; by default the newest that this Python can have.
NUMPY  ?= numpy
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3.9 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' \
	>/dev/null 2>&1 \
	&& echo $$p && break; done)

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The MPI of a wheel, as root (in a container) and with more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
MPIEXEC := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/mpiexec

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak fuzz lint format clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1|/' \
	| awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'
	@echo 'Variables: PYTHON and NUMPY (e.g. "numpy<2") for a new VENV (default .venv)'

setup: $(READY)  ## virtual environment with everything, Chainer built from source

# Chainer exists as a source package whose build needs pkg_resources: setuptools < 81, and no
# build isolation, which would fetch a newer one.
$(READY): setup.py
	@test -n "$(PYTHON)" || { echo 'No Python 3.9 to 3.12 that can make virtual environments;' \
	  'install one, or say make PYTHON=/path/to/python'; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' || \
	  { echo '$(PYTHON) is not a Python 3.9 to 3.12'; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools<81' wheel
	$(BIN)/python -m pip install --quiet '$(NUMPY)'
	$(BIN)/python -m pip install --quiet --no-build-isolation 'chainer==7.8.1'
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[mpi,demo,test,dev]' '$(NUMPY)'
	@touch $@

demo: setup  ## two MPI ranks learn real digits with compression; plots in result/demo
	$(MPIEXEC) -n 2 $(BIN)/python train/train_cifar10.py --dataset digits \
	  --communicator variance --out result/demo

test: setup  ## all tests, with 2, 3 and 8 MPI ranks; GPU tests where there is a GPU
	$(BIN)/python -m pytest

soak: setup  ## long tests: thousands of steps, 32 ranks, 3e8 parameters (half an hour, 16 GB)
	$(BIN)/python -m pytest --soak --timeout 3600

fuzz: setup  ## a million damaged messages for the decoder of every compressor
	$(BIN)/python -m tests.fuzz

lint: setup  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## let ruff format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and results of runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis result
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
