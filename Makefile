# Each target does its own set-up in .venv, once, and builds what has changed.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: setup test demo bench lint format clean

setup: .venv/ready fused_xent/_C.abi3.so

test: setup
	$(RUN) -m pytest

demo: setup
	$(RUN) -m bench.demo

bench: setup
	$(RUN) -m bench

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/ready
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/clang-format -i $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf .venv build fused_xent/_C*.so *.egg-info

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

fused_xent/_C.abi3.so: .venv/ready setup.py pyproject.toml $(shell find csrc -type f)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
