"""Tests of the emulator itself: right results, and every class of deliberate bug is caught."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import Harness, PtxError, preload_environment, translate_module

HERE = Path(__file__).parent / "emulator" / "selftest"
ORDERS = ["forward", "reverse", "random"]
LAUNCH_FAILURE, WRONG_RESULT = 719, -1
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
NO_KERNEL_IMAGE, NOT_SUPPORTED, INVALID_CLUSTER_SIZE = 209, 801, 912
GOOD = ["block", "warp", "shuffle", "vector", "named_barrier", "flag", "async_copy", "atomics"]
GOOD = [f"good_{name}" for name in [*GOOD, "cluster", "bulk_copy"]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("emulator")


def load(cache, source, arch="sm_90"):
    library = ctypes.CDLL(str(Harness([HERE / source], arch=arch).library(cache)))
    library.emulator_error.restype = ctypes.c_char_p
    return library


def configure(library, **settings):
    for name, value in settings.items():
        assert library.emulator_set(name.encode(), str(value).encode()) == 0, name


DEFAULTS = {"sm_count": 0, "order": "forward", "first_block": 0, "block_count": -1, "ulp_noise": 0}


@pytest.fixture(scope="module")
def rows_library(cache):
    return load(cache, "rows.cu")


@pytest.fixture
def rows(rows_library):
    yield rows_library
    configure(rows_library, device="sm_90", **DEFAULTS)


@pytest.fixture(scope="module")
def bugs_library(cache):
    return load(cache, "bugs.cu")


@pytest.fixture
def bugs(bugs_library):
    yield bugs_library
    configure(bugs_library, device="sm_90", **DEFAULTS)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def random_rows(rows, columns):
    return np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)


# ---- right results ----------------------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 7, 256, 257, 3001])
def test_row_sums(rows, columns, order):
    configure(rows, order=order, sm_count=3)
    x, sums = random_rows(30, columns), np.full(30, np.nan, np.float32)
    assert rows.sum_rows_f32(pointer(x), pointer(sums), ctypes.c_int64(30), columns) == 0
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=1e-4)


def test_bf16_row_sums(rows):
    x = random_rows(5, 1000)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    truncated = (bits.astype(np.uint32) << 16).view(np.float32)
    sums = np.full(5, np.nan, np.float32)
    assert rows.sum_rows_bf16(pointer(bits), pointer(sums), ctypes.c_int64(5), 1000) == 0
    np.testing.assert_allclose(sums, truncated.sum(1, dtype=np.float64), atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cluster_size", [1, 2, 8, 16])
def test_cluster_launch(rows, cluster_size, order):
    configure(rows, order=order)
    x, sums = random_rows(4, 2011), np.full(4, np.nan, np.float32)
    assert rows.sum_rows_on_cluster(pointer(x), pointer(sums), 4, 2011, cluster_size) == 0
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=1e-4)


def exponential(rows, factor=2.0):
    x = np.linspace(-10, 10, 1000, dtype=np.float32)
    result, launches = np.empty_like(x), ctypes.c_int()
    error = rows.scaled_exponential(
        pointer(result), pointer(x), x.size, ctypes.c_float(factor), ctypes.byref(launches)
    )
    assert error == 0
    return x, result, launches.value


def test_device_and_constant_variables(rows):
    _, _, before = exponential(rows)
    x, result, after = exponential(rows, 3.0)
    assert after == before + 1
    np.testing.assert_allclose(result, 3 * np.exp(x.astype(np.float64)), rtol=2e-6)


def test_ulp_noise(rows):
    _, exact, _ = exponential(rows)
    configure(rows, ulp_noise=7)
    _, noisy, _ = exponential(rows)
    ulps = np.abs(exact.view(np.int32) - noisy.view(np.int32))
    assert np.count_nonzero(ulps) > 0
    assert ulps.max() <= 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", GOOD)
def test_good_cases(bugs, case, order):
    configure(bugs, order=order)
    assert bugs.run_case(case.encode()) == 0, bugs.emulator_error()


def test_portable_fibers(cache):
    harness = Harness([HERE / "bugs.cu"], machine_flags=["-DEMULATOR_UCONTEXT"])
    library = ctypes.CDLL(str(harness.library(cache)))
    assert [library.run_case(case.encode()) for case in GOOD] == [0] * len(GOOD)


def test_unknown_instruction_names_its_line():
    ptx = ".target sm_90\n.entry k()\n{\n.reg .b32 %r<2>;\n\tfrobnicate.b32 %r1, 1;\nret;\n}\n"
    with pytest.raises(PtxError, match=r"PTX line 5: unsupported instruction: frobnicate\.b32"):
        translate_module(ptx)


# ---- the device table and launch errors -------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "facts"),
    [
        ("sm_80", (80, 108, 163 << 10)),
        ("sm_90", (90, 132, 227 << 10)),
        ("sm_100", (100, 148, 227 << 10)),
    ],
)
def test_device_table(rows, device, facts):
    configure(rows, device=device)
    values = [ctypes.c_int() for _ in facts]
    assert rows.device_facts(*map(ctypes.byref, values)) == 0
    assert tuple(v.value for v in values) == facts


def test_unknown_settings_are_refused(rows):
    assert rows.emulator_set(b"device", b"sm_1") == -1
    assert rows.emulator_set(b"colour", b"1") == -1


def test_ptx_newer_than_the_device(rows):
    configure(rows, device="sm_80")
    assert rows.launch_with(32, 0, 0) == NO_KERNEL_IMAGE


def test_ptx_for_sm_80(rows, cache):
    library = load(cache, "rows.cu", arch="sm_80")
    x, sums = random_rows(4, 300), np.full(4, np.nan, np.float32)
    assert library.sum_rows_f32(pointer(x), pointer(sums), ctypes.c_int64(4), 300) == 0
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=1e-4)
    assert library.sum_rows_on_cluster(pointer(x), pointer(sums), 4, 300, 2) == NOT_SUPPORTED


def test_launch_errors(rows):
    assert rows.launch_with(1025, 0, 0) == INVALID_CONFIGURATION
    assert rows.launch_with(0, 0, 0) == INVALID_CONFIGURATION
    assert rows.launch_with(32, 49 << 10, 0) == INVALID_VALUE  # not opted in
    assert rows.launch_with(32, 227 << 10, 1) == 0
    assert rows.launch_with(32, 228 << 10, 1) == INVALID_VALUE
    x = np.zeros((1, 64), np.float32)
    assert rows.sum_rows_on_cluster(pointer(x), pointer(x), 1, 64, 32) == INVALID_CLUSTER_SIZE
    rows.error_string.restype = ctypes.c_char_p
    assert rows.error_string(INVALID_VALUE) == b"invalid argument"


# ---- bugs that the machine reports ------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("divergent_barrier", "divergent barrier"),
        ("wrong_mask", "mask that omits the calling lane"),
        ("exited_lane", "exited"),
        ("misaligned_vector", "misaligned access: address is 4 modulo 16"),
        ("deadlock", "deadlock: no thread can run"),
        ("livelock", "livelock"),
        ("cluster_peer_exited", "shared memory of a block that has exited"),
    ],
)
def test_reported_bugs(bugs, case, report, order):
    configure(bugs, order=order)
    assert bugs.run_case(case.encode()) == LAUNCH_FAILURE
    text = bugs.emulator_error().decode()
    assert report in text
    assert "bugs.cu:" in text
    assert bugs.run_case(b"good_block") == 0  # the next launch is unaffected


def test_missing_async_wait_gives_a_wrong_result(bugs):
    assert bugs.run_case(b"missing_async_wait") == WRONG_RESULT


# ---- bugs that sanitizers report, in a native program -----------------------------------------
@pytest.fixture(scope="module")
def programs(cache):
    def build(sanitizer):
        harness = Harness([HERE / "bugs.cu"], [HERE / "bugs_main.cpp"], sanitizer=sanitizer)
        return harness.program(cache)

    return {sanitizer: build(sanitizer) for sanitizer in ("address", "thread")}


def run(command, **variables):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def run_program(program, *cases, order="forward"):
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0"}
    return run([program, *cases], EMULATOR_ORDER=order, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_good_cases_are_clean(programs, sanitizer, order):
    result = run_program(programs[sanitizer], *GOOD, order=order)
    assert result.returncode == 0, result.stderr
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == ["0"] * len(GOOD)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "case", ["static_shared_overrun", "dynamic_shared_overrun", "global_overrun"]
)
def test_overruns(programs, case, order):
    result = run_program(programs["address"], case, order=order)
    assert result.returncode != 0
    assert "ERROR: AddressSanitizer" in result.stderr
    assert "bugs.cu:" in result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "case",
    ["missing_syncthreads", "missing_syncwarp", "race_between_blocks", "missing_cluster_barrier"],
)
def test_races(programs, case, order):
    result = run_program(programs["thread"], case, order=order)
    assert result.returncode == 66, result.stdout
    assert "data race" in result.stderr
    assert "bugs.cu:" in result.stderr


@pytest.mark.parametrize(("case", "caught"), [("good_block", False), ("global_overrun", True)])
def test_address_sanitizer_inside_python(cache, case, caught):
    library = Harness([HERE / "bugs.cu"], sanitizer="address").library(cache)
    script = f"import ctypes; print(ctypes.CDLL({str(library)!r}).run_case({case.encode()!r}))"
    result = run([sys.executable, "-c", script], **preload_environment())
    assert (result.returncode != 0) == caught, result.stderr
    assert ("heap-buffer-overflow" in result.stderr) == caught


# ---- 64-bit indexing: the last block of a huge grid over sparse memory ------------------------
@pytest.mark.parametrize("wraps", [False, True])
def test_slice_of_a_huge_grid(bugs, wraps):
    rows, columns = (1 << 24) + 8, 256  # 4.3e9 floats; only touched pages cost memory
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    x = np.frombuffer(mmap.mmap(-1, rows * columns * 4, flags=flags), np.float32)
    y = np.zeros(1, np.float32)
    x[(rows - 1) * columns] = 42
    configure(bugs, first_block=rows - 1, block_count=1)
    assert bugs.row_start(pointer(x), pointer(y), rows, columns, int(wraps)) == 0
    assert (y[0] == 42) != wraps
