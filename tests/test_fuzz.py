"""The fuzzer is clean on this code, and finds a fault that is put into it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import calls

pytestmark = pytest.mark.cpu("the fuzzer chooses the devices itself")
ROOT = Path(__file__).parents[1]
WRONG = """
import torch, fused_xent
whole = fused_xent.functional.cross_entropy
def wrong(*tensors, **options):
    return whole(*tensors, **options) * (1 + 1e-4)
fused_xent.cross_entropy = wrong
"""
CRASH = """
import os, fused_xent
fused_xent.cross_entropy = lambda *tensors, **options: os.abort()
"""


def run_fuzz(*arguments, start=None, folder=None):
    """Run the fuzzer in processes of its own, with code that each of them runs first."""
    path = [str(ROOT / "tests"), str(ROOT)]
    if start is not None:
        (folder / "sitecustomize.py").write_text(start)
        path.insert(0, str(folder))
    return subprocess.run(
        [sys.executable, "-m", "fuzz", "--seed", "7", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_clean():
    result = run_fuzz("--calls", "200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "seed 7\n200 passed, 0 failed, in " in result.stdout


def call_of(form):
    """Return the number of a call of this function in one process."""
    return next(i for i in range(1, calls.RANKS) if calls.make_call(7, i).form == form)


def test_finds_a_wrong_number(tmp_path):
    number = call_of("cross_entropy")
    result = run_fuzz("--call", str(number), start=WRONG, folder=tmp_path)
    assert result.returncode == 1
    assert f'make fuzz ARGS="--seed 7 --call {number}"' in result.stdout
    assert "times the tolerance" in result.stdout
    assert "0 passed, 1 failed" in result.stdout


def test_goes_on_after_a_crash(tmp_path):
    n_calls = call_of("cross_entropy") + 2
    result = run_fuzz("--calls", str(n_calls), start=CRASH, folder=tmp_path)
    assert result.returncode == 1
    assert f'make fuzz ARGS="--seed 7 --call {n_calls - 2}"' in result.stdout
    n_failed = result.stdout.count("FAILED call ")
    assert f"{n_calls - n_failed} passed, {n_failed} failed" in result.stdout
    assert n_failed < n_calls
