# Each target does its own set-up in .venv, once, and builds what has changed.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: setup test mutants demo bench readme-tables gpu cuda-check lint format clean

setup: .venv/ready fused_xent/_C.abi3.so

test: setup
	$(RUN) -m pytest

# Puts faults into copies of the code, one at a time, and reports what no test sees: about an hour on
# two cores.
mutants: setup
	PYTHONPATH=tests $(RUN) -m mutants $(ARGS)

demo: setup
	$(RUN) -m bench.demo

bench: setup
	$(RUN) -m bench

# From bench/results.
readme-tables: setup
	$(RUN) -m bench.readme

# All of it on the GPU of this machine, with the Python that is there: no set-up, no network.
gpu:
	PYTHON=$(PYTHON) tests/gpu.sh $(STAGES)

# That the binary which is built here, under any torch, loads under one with CUDA; needs no GPU.
cuda-check: setup .venv-cuda/ready
	.venv/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	.venv-cuda/bin/pip install --quiet --no-deps --no-index --find-links dist --force-reinstall fused_xent
	.venv-cuda/bin/python tests/cuda_check.py

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/ready
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/clang-format -i $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf .venv .venv-cuda build dist fused_xent/_C*.so *.egg-info

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-cuda/ready:  # torch from PyPI has CUDA: 5 GB
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check torch numpy
	touch $@

# And _C_cuda.abi3.so, where nvcc is.
fused_xent/_C.abi3.so: .venv/ready setup.py pyproject.toml $(shell find csrc -type f)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
