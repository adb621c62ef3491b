"""Fixtures and markers of the whole suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A thread that waits for another sleeps: on a busy machine spinning takes most of the time.
# OpenMP reads this when it is loaded, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from emulator import build

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu, or cuda")


def pytest_configure(config):
    torch.set_default_device(config.getoption("--device"))
    config.addinivalue_line("markers", "kernels: numbers; run again under each instruction set")
    config.addinivalue_line("markers", "cpu(reason): not on another --device")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        return
    from fused_xent import _ops

    if _ops.CUDA_LOAD_ERROR is not None:  # torch's operations would pass for kernels
        raise pytest.UsageError(f"--device: no CUDA kernels, because {_ops.CUDA_LOAD_ERROR}")
    for item in items:
        for mark in item.iter_markers("cpu"):
            item.add_marker(pytest.mark.skip(reason=f"on the CPU alone: {mark.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test's time limit starts here, so builds must have been made by its fixtures."""

    def refuse(command):
        raise RuntimeError(f"build in a fixture, not under the test's time limit: {command[0]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run", refuse)
        return (yield)


@pytest.fixture(scope="session")
def device(request):
    """The kind of device that tensors are made on."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def emulator_builds(tmp_path_factory):
    """The folder of builds for the emulator, which share what is the same.

    FUSED_XENT_TEST_BUILDS names one that is kept, for builds that share with those of earlier runs.
    """
    kept = os.environ.get("FUSED_XENT_TEST_BUILDS")
    return Path(kept) if kept else tmp_path_factory.mktemp("emulator")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def few_logits_in_chunks(monkeypatch):
    """Lets small linear layers take the way of large ones."""
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 0)


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and restores it."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@pytest.fixture
def run_python():
    """Runs Python in a process of its own, with the package that is under test, and returns it."""

    def run(*arguments, **environment):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=880,
        )

    return run
