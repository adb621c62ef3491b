"""The CUDA kernels without torch, in the emulator: tests/native/cuda_check.cpp.

The PTX of each architecture runs under the sanitizers and in several schedules.
"""

import re
import subprocess

import pytest
from cuda_builds import KERNELS, MISSING, environment, program

pytestmark = [
    pytest.mark.cpu("in the emulator"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


def run(path, *arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [path, *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=500,
    )


def assert_right(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert int(re.search(r"(\d+) checks, 0 failures", result.stdout)[1]) > 1000


REDUCED = {"defines": ["FUSED_XENT_BFLOAT16_ALONE"]}
# Files of csrc/cuda, and the sanitizers that find the faults of mutants/ in them.
PARTS = [
    *((kernels, "") for kernels in KERNELS),
    ("forward_backward", "address"),
    ("forward_backward", "thread"),
    ("columns", "address"),
    ("per_class_options", "address"),
    ("per_class_options", "thread"),
    ("sparse_labels", "address"),
    ("sparse_labels", "thread"),
]


@pytest.fixture(scope="module")
def addressed(emulator_builds):
    return program(emulator_builds, "sm_90", "address")


@pytest.fixture(scope="module")
def of_sm_80(emulator_builds):
    return program(emulator_builds, "sm_80")


@pytest.fixture(scope="module")
def threaded(emulator_builds):
    return program(emulator_builds, "sm_90", "thread", **REDUCED)


@pytest.fixture(scope="module")
def of_sm_90(emulator_builds):
    return program(emulator_builds, "sm_90", "", ("forward_backward",), **REDUCED)


@pytest.fixture(scope="module", params=PARTS, ids=lambda part: "-".join(filter(None, part)))
def part(request, emulator_builds):
    """A program with the kernels of one file, for bfloat16 only, with or without a sanitizer."""
    kernels, sanitizer = request.param
    return *request.param, program(emulator_builds, "sm_90", sanitizer, (kernels,), **REDUCED)


def test_sm_90_under_address_sanitizer(addressed):
    assert_right(run(addressed))


@pytest.mark.parametrize(("order", "copies"), [("reverse", "late"), ("random", "early")])
def test_schedules_and_approximation_noise(addressed, order, copies):
    noise = len(order)
    result = run(addressed, "--bfloat16", order=order, copies=copies, seed=7, ulp_noise=noise)
    assert_right(result)


def test_sm_80(of_sm_80):
    assert_right(run(of_sm_80))


def test_sm_80_code_on_sm_90(of_sm_80):
    """PTX of sm_80 has no clusters; it runs on a device that has them."""
    assert_right(run(of_sm_80, "--bfloat16", device="sm_90"))


def test_races(threaded):
    assert_right(run(threaded, "--small", "--bfloat16"))


def test_device_without_room_for_clusters(of_sm_90):
    """Each row is left to one block, or to a smaller cluster."""
    for size in (1, 2):
        assert_right(run(of_sm_90, "--bfloat16", "forward_backward", largest_cluster=size))


def test_launchers_can_be_captured_cold(of_sm_90):
    """No call of the CUDA runtime waits for the device, not even the first one for a kernel."""
    assert_right(run(of_sm_90, "--bfloat16", "forward_backward", capturing=1))


def test_part(part):
    """Some faults show only with early copies, or with threads in reverse order."""
    kernels, sanitizer, path = part
    options = ["--bfloat16", kernels, *(["--small"] if sanitizer == "thread" else [])]
    assert_right(run(path, *options))
    if kernels == "forward_backward" and not sanitizer:
        assert_right(run(path, *options, copies="early", order="reverse"))
