"""Fixtures and markers of the whole suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Waiting threads sleep instead of spinning, which would take most of the time on a busy machine.
# OpenMP reads this variable when torch loads it, so it is set before the import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The key of this cache on disk knows the operators, but not the formulas of their gradients.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import torch
from emulator import build

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tensors: cpu or cuda")


def pytest_configure(config):
    torch.set_default_device(config.getoption("--device"))
    config.addinivalue_line("markers", "kernels: run again under each instruction set")
    config.addinivalue_line("markers", "cpu(reason): skipped unless --device is cpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        return
    from fused_xent import _ops

    if _ops.CUDA_LOAD_ERROR is not None:  # torch's operations would run instead
        raise pytest.UsageError(f"--device: no CUDA kernels, because {_ops.CUDA_LOAD_ERROR}")
    for item in items:
        for mark in item.iter_markers("cpu"):
            item.add_marker(pytest.mark.skip(reason=f"runs on the CPU only: {mark.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail if a test builds: its time limit runs, so builds belong in fixtures."""

    def refuse(command):
        raise RuntimeError(f"a test must not build; build in a fixture, got command {command[0]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run", refuse)
        return (yield)


@pytest.fixture(scope="session")
def device(request):
    """The device type of the tensors: the value of --device."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def emulator_builds(tmp_path_factory):
    """The build folder of the emulator, a cache shared by all builds and processes of the session.

    If FUSED_XENT_TEST_BUILDS names a folder, it is used and kept for later runs.
    """
    if kept := os.environ.get("FUSED_XENT_TEST_BUILDS"):
        return Path(kept)
    folder = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    return (folder.parent if is_worker else folder) / "emulator"


@pytest.fixture(autouse=True)
def seed(device):
    # torch.manual_seed keeps a stack trace for each kind of GPU: longer than many tests.
    (torch.default_generator if device == "cpu" else torch).manual_seed(0)


@pytest.fixture
def few_logits_in_chunks(monkeypatch):
    """Makes small linear layers compute in chunks, as large ones do."""
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 0)


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and restores it."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@pytest.fixture
def run_python():
    """Runs Python in a subprocess, with the package under test; returns the completed process."""

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
