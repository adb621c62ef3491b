# Each target sets up .venv if needed, and builds only what has changed.
PYTHON ?= python3
RUN := .venv/bin/python
WITH_NINJA := PATH="$(CURDIR)/.venv/bin:$$PATH"
# What `make build` compiles.
CAPABILITY ?= $(if $(filter x86_64,$(shell uname -m)),avx2,portable)
ARCH ?= 9.0
# The tests of `make check`: at most two minutes on two cores, once everything is built. They leave
# out the sanitizers, and run one kernel file in the emulator.
CHECK ?= $(patsubst %,tests/test_%.py,functional nn errors layouts autograd overwriting linear_errors) \
	"tests/test_cuda_native.py::test_part[forward]"

.PHONY: setup build check test fuzz matrix integrations mutants demo bench readme-tables gpu cuda-check lint format clean

setup: build/full

# A fast build for editing kernels: one instruction set and one GPU architecture, as in
# `make build CAPABILITY=avx512 ARCH=8.0`. `make setup`, and every target that needs it, replaces it
# by a full build. Both builds write compile_commands.json for editors.
build: .venv/ready
	rm -f build/full
	$(WITH_NINJA) FUSED_XENT_CPU_CAPABILITIES=$(CAPABILITY) TORCH_CUDA_ARCH_LIST="$(ARCH)" \
		$(RUN) setup.py --quiet build_ext --inplace

check: build
	FUSED_XENT_TEST_BUILDS=build/emulator $(RUN) -m pytest --durations=5 $(CHECK)

# Several processes share the test files, in alphabetical order: most tests keep one core busy, and
# the files with few tests, which build, should not be the last ones.
test: setup
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# 100000 random calls of every public loss, compared with float64: `make fuzz ARGS="--seed 7 --calls
# 1000"`. Takes about 20 minutes on two cores.
fuzz: setup
	PYTHONPATH=tests:. $(RUN) -m fuzz $(ARGS)

# Tests one binary under the oldest and the newest torch and Python, and under each instruction set.
# Makes environments in .venv-matrix, of 5 GB each where torch includes CUDA.
matrix: setup
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) tests/matrix.py $(ARGS)

# The tests of fused_xent.integrations, with the frameworks that the extra of that name pins.
integrations: setup .venv-integrations/ready
	.venv-integrations/bin/python -m pytest --durations=5 tests/integrations

# Puts faults into copies of the code, one at a time, and reports those that no test finds. Takes
# about an hour on two cores.
mutants: setup
	PYTHONPATH=tests $(RUN) -m mutants $(ARGS)

demo: setup
	$(RUN) -m bench.demo

bench: setup
	$(RUN) -m bench

# Writes the tables in README.md from bench/results.
readme-tables: setup
	$(RUN) -m bench.readme

# Builds, tests and measures on this machine's GPU, with $(PYTHON): no .venv, no network.
gpu:
	PYTHON=$(PYTHON) tests/gpu.sh $(STAGES)

# Checks that the binary, built here under any torch, loads under a torch with CUDA. Needs no GPU.
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
	rm -rf .venv .venv-cuda .venv-integrations .venv-matrix build dist fused_xent/_C*.so *.egg-info compile_commands.json .mypy_cache

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-integrations/ready: requirements-dev.txt pyproject.toml build/full
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	PATH="$(CURDIR)/.venv-integrations/bin:$$PATH" FUSED_XENT_CUDA=0 .venv-integrations/bin/pip \
		install --quiet --disable-pip-version-check --no-build-isolation --editable '.[integrations]'
	touch $@

.venv-cuda/ready:  # torch from PyPI includes CUDA: 5 GB
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check torch numpy
	touch $@

# Builds the CPU library and, if nvcc is found, the CUDA library. build/full is the time stamp.
build/full: .venv/ready setup.py pyproject.toml $(shell find csrc -type f)
	$(WITH_NINJA) FUSED_XENT_CPU_CAPABILITIES= .venv/bin/pip install --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
