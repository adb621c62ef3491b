"""The emulator: right results, and every class of deliberate bug is reported."""

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from emulator import Harness, PtxError, missing_tools, preload_environment, translate_module
from emulator.ptx_operands import identifier

pytestmark = pytest.mark.cpu("runs in the emulator")

SELFTEST = Path(__file__).parent / "emulator" / "selftest"
ORDERS = ("forward", "reverse", "random")
LAUNCH_FAILURE, WRONG_RESULT = 719, -1
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
NO_KERNEL_IMAGE, NOT_SUPPORTED, INVALID_CLUSTER_SIZE = 209, 801, 912
OUT_OF_RESOURCES, CAPTURE_UNSUPPORTED = 701, 900
GOOD_CASES = ("block", "warp", "shuffle", "vector", "named_barrier", "flag", "atomics", "cluster")
GOOD_COPIES = ("async_copy", "two_groups", "partial_copy", "double_buffer", "bulk_copy")
GOOD = [f"good_{name}" for name in (*GOOD_CASES, *GOOD_COPIES)]
COPIES = ("late", "early")
DEFAULTS = {"sm_count": 0, "order": "forward", "first_block": 0, "block_count": -1, "ulp_noise": 0}
DEFAULTS |= {"copies": "late", "largest_cluster": 0, "capturing": 0}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    if missing_tools():
        pytest.skip(f"not installed: {', '.join(missing_tools())}")
    return tmp_path_factory.mktemp("emulator")


def in_selftest(*names):
    return [SELFTEST / name for name in names]


def load(cache, *sources, **options):
    library = ctypes.CDLL(str(Harness(in_selftest(*sources), **options).library(cache)))
    library.emulator_error.restype = ctypes.c_char_p
    return library


def configure(library, **settings):
    for name, value in settings.items():
        assert library.emulator_set(name.encode(), str(value).encode()) == 0, name


def run_case(library, case):
    unknown = -2
    result = library.run_case(case.encode())
    return library.run_copies(case.encode()) if result == unknown else result


@pytest.fixture(scope="session")
def built(cache):
    return load(cache, "rows.cu", "bugs.cu", "copies.cu", "instructions.cu")


@pytest.fixture
def library(built):
    yield built
    configure(built, device="sm_90", **DEFAULTS)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def random_rows(library, columns):
    return np.random.default_rng(columns).standard_normal((library, columns)).astype(np.float32)


# ---- right results ----------------------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 7, 256, 257, 3001])
def test_row_sums(library, columns, order):
    configure(library, order=order, sm_count=3)
    x, sums = random_rows(30, columns), np.full(30, np.nan, np.float32)
    assert library.sum_rows_f32(pointer(x), pointer(sums), ctypes.c_int64(30), columns) == 0
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=1e-4)


def test_bf16_row_sums(library):
    x = random_rows(5, 1000)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    truncated = (bits.astype(np.uint32) << 16).view(np.float32)
    sums = np.full(5, np.nan, np.float32)
    assert library.sum_rows_bf16(pointer(bits), pointer(sums), ctypes.c_int64(5), 1000) == 0
    np.testing.assert_allclose(sums, truncated.sum(1, dtype=np.float64), atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cluster_size", [1, 2, 8, 16])
def test_cluster_launch(library, cluster_size, order):
    configure(library, order=order)
    x, sums = random_rows(4, 2011), np.full(4, np.nan, np.float32)
    assert library.sum_rows_on_cluster(pointer(x), pointer(sums), 4, 2011, cluster_size) == 0
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=1e-4)


def exponential(library, factor=2.0):
    x = np.linspace(-10, 10, 1000, dtype=np.float32)
    result, launches = np.empty_like(x), ctypes.c_int()
    error = library.scaled_exponential(
        pointer(result), pointer(x), x.size, ctypes.c_float(factor), ctypes.byref(launches)
    )
    assert error == 0
    return x, result, launches.value


def test_device_and_constant_variables(library):
    _, _, before = exponential(library)
    x, result, after = exponential(library, 3.0)
    assert after == before + 1
    np.testing.assert_allclose(result, 3 * np.exp(x.astype(np.float64)), rtol=2e-6)


def test_ulp_noise(library):
    _, exact, _ = exponential(library)
    configure(library, ulp_noise=7)
    _, noisy, _ = exponential(library)
    ulps = np.abs(exact.view(np.int32) - noisy.view(np.int32))
    assert np.count_nonzero(ulps) > 0
    assert ulps.max() <= 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", GOOD)
def test_good_cases(library, case, order):
    configure(library, order=order)
    assert run_case(library, case) == 0, library.emulator_error()


@pytest.fixture(scope="module")
def portable(cache):
    return load(cache, "bugs.cu", "copies.cu", machine_flags=["-DEMULATOR_UCONTEXT"])


def test_portable_fibers(portable):
    assert [run_case(portable, case) for case in GOOD] == [0] * len(GOOD)


INSTRUCTIONS = ("prmt", "shf.l.wrap", "shf.l.clamp", "shf.r.wrap", "shf.r.clamp", "bfi", "redux")
INSTRUCTIONS += ("lop3.majority", "lop3.select", "lop3.lopsided", "bfe.u32", "bfe.s32", "max.f32")
INSTRUCTIONS += ("max.bf16x2", "max.NaN.bf16x2", "bar.red", "atom.cas", "cvt.bf16.f64", "double")


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(library, name):
    assert library.mismatches(name.encode()) == 0


def translate(body="", directives=""):
    lines = [".target sm_90", ".entry k()", directives, "{", ".reg .b32 %r<2>;", body, "ret;", "}"]
    return translate_module("\n".join([*lines, ""]))


def test_unknown_instruction_names_its_line():
    with pytest.raises(PtxError, match=r"PTX line 6: unsupported instruction: frobnicate\.b32"):
        translate("frobnicate.b32 %r1, 1;")


@pytest.mark.parametrize("instruction", ["add.rz.f32x2", "mul.rn.ftz.f32x2"])
def test_pairs_of_floats_are_rounded_to_nearest(instruction):
    pairs = "".join(translate(".reg .b64 %p<2>;\nadd.rn.f32x2 %p1, %p1, %p1;"))
    assert "pair_of(low_of(_p1) + low_of(_p1), high_of(_p1) + high_of(_p1))" in pairs
    with pytest.raises(PtxError, match=f"unsupported instruction: {instruction}"):
        translate(f".reg .b64 %p<2>;\n{instruction} %p1, %p1, %p1;")


def test_clusters_in_y_are_not_supported():
    translate(directives=".reqnctapercluster 2, 1, 1")
    with pytest.raises(PtxError, match="PTX line 2: clusters in y or z are not supported"):
        translate(directives=".reqnctapercluster 2, 2, 1")


# ---- the device table and launch errors -------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "facts"),
    [
        ("sm_80", (80, 108, 163 << 10)),
        ("sm_90", (90, 132, 227 << 10)),
        ("sm_100", (100, 148, 227 << 10)),
    ],
)
def test_device_table(library, device, facts):
    configure(library, device=device)
    values = [ctypes.c_int() for _ in facts]
    assert library.device_facts(*map(ctypes.byref, values)) == 0
    assert tuple(v.value for v in values) == facts


def test_unknown_settings_are_refused(library):
    assert library.emulator_set(b"device", b"sm_1") == -1
    assert library.emulator_set(b"colour", b"1") == -1


def test_ptx_newer_than_the_device(library):
    configure(library, device="sm_80")
    assert library.launch_with(32, 0, 0) == NO_KERNEL_IMAGE


def test_launch_errors(library):
    assert library.launch_with(1025, 0, 0) == INVALID_CONFIGURATION
    assert library.launch_with(0, 0, 0) == INVALID_CONFIGURATION
    assert library.launch_with(32, 49 << 10, 0) == INVALID_VALUE  # not opted in
    assert library.launch_with(32, 227 << 10, 1) == 0
    assert library.launch_with(32, 228 << 10, 1) == INVALID_VALUE
    x = np.zeros((1, 64), np.float32)
    assert library.sum_rows_on_cluster(pointer(x), pointer(x), 1, 64, 32) == INVALID_CLUSTER_SIZE
    library.error_string.restype = ctypes.c_char_p
    assert library.error_string(INVALID_VALUE) == b"invalid argument"


def test_device_without_room_for_a_cluster(library):
    configure(library, largest_cluster=2)
    x = np.zeros((1, 64), np.float32)
    for size, error in ((2, 0), (4, OUT_OF_RESOURCES)):
        assert library.sum_rows_on_cluster(pointer(x), pointer(x), 1, 64, size) == error
    assert library.launch_with(32, 0, 0) == OUT_OF_RESOURCES  # the last error, which this resets


def test_capture(library):
    """Launches can be captured, copies that wait for the device cannot."""
    configure(library, capturing=1)
    x, launches = np.zeros(64, np.float32), ctypes.c_int()
    assert library.sum_rows_f32(pointer(x), pointer(x), ctypes.c_int64(1), 64) == 0
    arguments = (pointer(x), pointer(x), 64, ctypes.c_float(1), ctypes.byref(launches))
    assert library.scaled_exponential(*arguments) == CAPTURE_UNSUPPORTED


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
def test_reported_bugs(library, case, report, order):
    configure(library, order=order)
    assert run_case(library, case) == LAUNCH_FAILURE
    text = library.emulator_error().decode()
    assert report in text
    assert "bugs.cu:" in text
    assert library.run_case(b"good_block") == 0  # the next launch is unaffected


@pytest.mark.parametrize("case", ["missing_async_wait", "early_read"])
def test_late_copies_expose_missing_waits(library, case):
    assert run_case(library, case) == WRONG_RESULT


@pytest.mark.parametrize("order", ORDERS)
def test_early_copies(library, order):
    """Early copies overwrite data that is still needed; late ones hide the bug."""
    good = [f"good_{name}" for name in GOOD_COPIES if name != "two_groups"]  # expects late copies
    for copies, outcome in (("late", 0), ("early", WRONG_RESULT)):
        configure(library, copies=copies, order=order)
        assert [run_case(library, case) for case in good] == [0] * len(good)
        assert run_case(library, "early_overwrite_alone") == outcome


# ---- bugs that sanitizers report, in a native program -----------------------------------------
@pytest.fixture(scope="session")
def programs(cache):
    def build(sanitizer):
        sources = in_selftest("bugs.cu", "copies.cu")
        harness = Harness(sources, in_selftest("bugs_main.cpp"), sanitizer=sanitizer)
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
    [
        "missing_syncthreads",
        "missing_syncwarp",
        "race_between_blocks",
        "missing_cluster_barrier",
        "relaxed_cluster_barrier",
        "early_overwrite",
    ],
)
def test_races(programs, case, order):
    result = run_program(programs["thread"], case, order=order)
    assert result.returncode == 66, result.stdout
    assert "data race" in result.stderr
    assert ("copies.cu:" if case == "early_overwrite" else "bugs.cu:") in result.stderr


@pytest.fixture(scope="module")
def sanitized(cache):
    return Harness(in_selftest("bugs.cu", "copies.cu"), sanitizer="address").library(cache)


@pytest.mark.parametrize(("case", "caught"), [("good_block", False), ("global_overrun", True)])
def test_address_sanitizer_inside_python(sanitized, case, caught):
    script = f"import ctypes; print(ctypes.CDLL({str(sanitized)!r}).run_case({case.encode()!r}))"
    result = run([sys.executable, "-c", script], **preload_environment())
    assert (result.returncode != 0) == caught, result.stderr
    assert ("heap-buffer-overflow" in result.stderr) == caught


# ---- 64-bit indexing: the last block of a huge grid over sparse memory ------------------------
@pytest.mark.parametrize("wraps", [False, True])
def test_slice_of_a_huge_grid(library, wraps):
    rows, columns = (1 << 24) + 8, 256  # 4.3e9 floats; only touched pages cost memory
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    x = np.frombuffer(mmap.mmap(-1, rows * columns * 4, flags=flags), np.float32)
    y = np.zeros(1, np.float32)
    x[(rows - 1) * columns] = 42
    configure(library, first_block=rows - 1, block_count=1)
    assert library.row_start(pointer(x), pointer(y), rows, columns, int(wraps)) == 0
    assert (y[0] == 42) != wraps


# ---- what can be built -------------------------------------------------------------------------
def as_module(path):
    spec = importlib.util.spec_from_file_location("twins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def twins(cache):
    """A Python module of two files with static kernels and variables of the same names."""
    harness = Harness(
        in_selftest("twin_a.cu", "twin_b.cu"),
        in_selftest("twins.cpp"),
        arch="sm_80",
        defines=["TWIN_OFFSET=1"],
        host_flags=[f"-isystem{sysconfig.get_paths()['include']}"],
        link_flags=["-Wl,-z,undefs"],  # symbols of Python stay undefined
    )
    return as_module(harness.library(cache, "twins.so"))


def test_static_kernels_of_the_same_name(twins):
    assert [twins.triple(7), twins.quintuple(7), twins.triple(8)] == [22, 36, 25]
    assert twins.launch_in_pairs() == NOT_SUPPORTED  # clusters need sm_90


VALUE_OF_HEADER = """
#include <deep/value.h>
extern "C" __attribute__((visibility("default"))) int value() { return VALUE; }
"""


@pytest.fixture(scope="module")
def builds_of_a_header(cache, tmp_path_factory):
    """Return (value, path) of a library, built again after each change of its header."""
    folder = tmp_path_factory.mktemp("header")
    header, source = folder / "include/deep/value.h", folder / "source/value.cpp"
    for path in (header, source):
        path.parent.mkdir(parents=True)
    source.write_text(VALUE_OF_HEADER)
    built = []
    for value in (1, 2, 2):
        header.write_text(f"#define VALUE {value}\n")
        # This header is not included: its changes must not matter.
        (folder / "include/other.h").write_text(f"// {len(built)}\n")
        path = Harness([], [source], include=[folder / "include"]).library(cache)
        built.append((value, path))
    return built


def test_changed_header_rebuilds(builds_of_a_header):
    for value, path in builds_of_a_header:
        assert ctypes.CDLL(str(path)).value() == value
    first, second, third = (path for _, path in builds_of_a_header)
    assert first != second == third


def test_builds_outside_fixtures_fail(cache, tmp_path):
    (tmp_path / "new.cpp").write_text("int value;\n")
    with pytest.raises(RuntimeError, match="build in a fixture"):
        Harness([], [tmp_path / "new.cpp"]).library(cache)


def test_names_do_not_say_which_build_they_are_of():
    """nvcc numbers unnamed namespaces; kernels that are otherwise equal are compiled once."""
    form = "_ZN2ns52_GLOBAL__N__{}_19_forward_backward_cu_{}6kernelIfEEvi"
    names = [
        identifier(form.format(*numbers))
        for numbers in (("9f1f2d84", "4bf1c29b"), ("0" * 8, "1" * 8))
    ]
    assert names[0] == names[1]
    assert identifier(form.format("9f1f2d84", "4bf1c29b").replace("backward", "other")) != names[0]
