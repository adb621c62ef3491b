# Each target does its own set-up in .venv, once, and builds what has changed.
PYTHON ?= python3
RUN := .venv/bin/python
WITH_NINJA := PATH="$(CURDIR)/.venv/bin:$$PATH"
# What `make build` compiles.
CAPABILITY ?= $(if $(filter x86_64,$(shell uname -m)),avx2,portable)
ARCH ?= 9.0
# What `make check` runs: at most two minutes on two cores, once everything is built. No sanitizers,
# and of the emulator one kernel file.
CHECK ?= $(patsubst %,tests/test_%.py,functional nn errors layouts autograd overwriting linear_errors) \
	"tests/test_cuda_native.py::test_part[forward]"

.PHONY: setup build check test mutants demo bench readme-tables gpu cuda-check lint format clean

setup: build/full

# For the time while kernels are edited: one instruction set and one GPU architecture, as in
# `make build CAPABILITY=avx512 ARCH=8.0`. `make setup` and all that needs it replace it by a full
# build. Writes compile_commands.json for editors, as a full build does.
build: .venv/ready
	rm -f build/full
	$(WITH_NINJA) FUSED_XENT_CPU_CAPABILITIES=$(CAPABILITY) TORCH_CUDA_ARCH_LIST=$(ARCH) \
		$(RUN) setup.py --quiet build_ext --inplace

check: build
	FUSED_XENT_TEST_BUILDS=build/emulator $(RUN) -m pytest --durations=5 $(CHECK)

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
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/ready
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/clang-format -i $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf .venv .venv-cuda build dist fused_xent/_C*.so *.egg-info compile_commands.json .mypy_cache

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-cuda/ready:  # torch from PyPI has CUDA: 5 GB
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check torch numpy
	touch $@

# Both libraries, where nvcc is; build/full says when.
build/full: .venv/ready setup.py pyproject.toml $(shell find csrc -type f)
	$(WITH_NINJA) FUSED_XENT_CPU_CAPABILITIES= .venv/bin/pip install --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
