"""The CUDA kernels without torch, from the PTX of each architecture: tests/native/cuda_check.cpp.

Under the sanitizers, in several schedules, and with faults put into them, which must be found.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_builds import CSRC, MISSING, environment, program

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


def write_reduced(folder, changes=()):
    """Copy the kernels, for bfloat16 alone, with texts replaced in csrc/cuda."""
    shutil.copytree(CSRC, folder / "csrc")
    dispatch = folder / "csrc" / "cuda" / "dispatch.cuh"
    text = dispatch.read_text()
    reduced = re.sub(
        r"  switch \(dtype\) \{.*?\n  \}\n",
        "  (void)dtype;\n  return body(Type<__nv_bfloat16>{});\n",
        text,
        flags=re.DOTALL,
    )
    assert reduced != text
    dispatch.write_text(reduced)
    for name, old, new in changes:
        path = folder / "csrc" / "cuda" / name
        assert path.read_text().count(old) == 1, f"{old!r} in {name}"
        path.write_text(path.read_text().replace(old, new))
    return folder / "csrc"


@pytest.fixture(scope="module")
def addressed(emulator_builds):
    return program(emulator_builds, "sm_90", "address")


@pytest.mark.timeout(900)
def test_sm_90_under_address_sanitizer(addressed):
    assert_right(run(addressed))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_schedules_and_noise_on_approximate_instructions(addressed, order):
    assert_right(run(addressed, "--bfloat16", order=order, seed=7, ulp_noise=len(order)))


@pytest.mark.timeout(900)
def test_sm_80(emulator_builds):
    assert_right(run(program(emulator_builds, "sm_80")))


@pytest.mark.timeout(900)
def test_code_of_an_older_architecture(emulator_builds):
    """It has no clusters, though the device has."""
    assert_right(run(program(emulator_builds, "sm_80"), "--bfloat16", device="sm_90"))


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    return write_reduced(tmp_path_factory.mktemp("reduced"))


@pytest.mark.timeout(900)
def test_races(emulator_builds, reduced):
    checked = program(emulator_builds, "sm_90", "thread", reduced)
    assert_right(run(checked, "--small", "--bfloat16"))


# Name: sanitizer, kernels, arguments, file of csrc/cuda, old and new text.
FAULTS = {
    "a barrier of a block is missing": (
        *("", "forward", "team.cuh"),
        "      __syncthreads();\n",
        "",
    ),
    "the barrier of a cluster is missing": (
        *("", "forward_backward", "team.cuh"),
        "    cluster.sync();\n    stats",
        "    stats",
    ),
    "rows share the memory of the exchange": (
        *("thread", "forward_backward", "team.cuh"),
        "    turn_ ^= 1;\n",
        "",
    ),
    "lanes are merged without a common maximum": (
        *("", "forward", "team.cuh"),
        "  shift_stats(stats, max);\n",
        "  stats.max = max;\n",
    ),
    "a vector too many is read": (
        *("", "forward", "sweep.cuh"),
        "bits[u] = w < end ? read",
        "bits[u] = w <= end ? read",
    ),
    "a class too many is in a row's gradient": (
        *("", "columns", "columns.cu"),
        "static_cast<int>(min(vocab_size - j, int64_t{kGroup}))",
        "kGroup",
    ),
    "single elements are taken one by one": (
        *("", "forward", "sweep.cuh"),
        "i < view.n_edges; i += step) {\n    const int j = view.edge_class(i);\n    Acc",
        "i < view.n_edges; ++i) {\n    const int j = view.edge_class(i);\n    Acc",
    ),
    "an ignored row is read": (
        *("address", "forward_backward", "forward_backward.cu"),
        "    if (!row.is_read) {\n",
        """
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row.index);
    if (to_acc(logits[a.vocab_size / 2]) > A(1e30)) return;
    if (!row.is_read) {
""",
    ),
    "nobody waits for the copies": (
        *("", "forward_backward", "forward_backward.cu"),
        "    wait_for_copies();\n",
        "",
    ),
    "the next row is said to be there and was not asked for": (
        *("", "forward_backward", "forward_backward.cu"),
        "      if (next.is_read) fetch_registers(next, next_share, g);\n",
        "",
    ),
    "the next row's first element is that of this row": (
        *("", "forward_backward", "forward_backward.cu"),
        "    if (next.is_read) fetch_edge(next, next_share);\n",
        "",
    ),
    "sums are not moved to another maximum": (
        *("", "forward", "sweep.cuh"),
        "    this->sum *= ShiftedExp<T>(this->max).to(ShiftedExp<T>(max));\n",
        "",
    ),
    "what a row's exponentials have in common stays in its sum": (
        *("", "forward", "sweep.cuh"),
        "    stats.sum *= ShiftedExp<T>(this->max).to_exact();\n",
        "",
    ),
    "the target's gradient is as the others'": (
        *("", "backward", "backward.cu"),
        "    if (has_target) out[target.index] = from_acc<T>(gradient.at_target);\n",
        "",
    ),
    "the moment is not moved with the maximum": (
        *("", "general", "general.cuh"),
        "    moment = factor == 0 ? A(0) : factor * moment;\n",
        "",
    ),
    "a row of weight 0 is read": (
        *("address", "general", "labels.cuh"),
        "  if (has_no_weight(p, row)) return {-1, true, false};\n",
        "",
    ),
    "the target's derivative is left out": (
        *("", "general", "general.cu"),
        "from_acc<T>(at_target * view.transform.slope(x))",
        "from_acc<T>(at_target)",
    ),
    "a team does not wait for its statistics": (
        *("", "general", "general.cu"),
        "    wait();\n    if (rank >= n) continue;\n",
        "    if (rank >= n) continue;\n",
    ),
    "the workers' statistics are not awaited": (
        *("", "columns", "columns.cu"),
        "    }\n    __syncthreads();\n    for (int slot",
        "    }\n    for (int slot",
    ),
}


@pytest.fixture(scope="module")
def results_with_faults(emulator_builds, tmp_path_factory):
    """By fault: what the check of the kernels that have it says."""

    def check(fault: str) -> subprocess.CompletedProcess:
        sanitizer, kernels, name, old, new = FAULTS[fault]
        csrc = write_reduced(tmp_path_factory.mktemp("fault"), [(name, old, new)])
        checked = program(emulator_builds, "sm_90", sanitizer, csrc, (kernels,))
        small = ["--small"] if sanitizer == "thread" else []
        return run(checked, *small, "--bfloat16", kernels)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(check, FAULTS), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(results_with_faults, fault):
    result = results_with_faults[fault]
    assert result.returncode != 0
    assert "FAILED" in result.stdout or "Sanitizer" in result.stderr, result.stderr[-3000:]
