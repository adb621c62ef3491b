"""The fault tables: they apply to the code, cover every file, and tests find a sample."""

from collections import Counter
from pathlib import Path

import cuda_builds
import pytest
from mutants import TABLES
from mutants.runner import NATIVE, Runner

pytestmark = pytest.mark.cpu("independent of the device")

ROOT = Path(__file__).parents[1]
SAMPLE = {
    "python": 4,
    "integrations": 0,
    "bench": 2,
    "binding": 2,
    "cpu": 3,
    "cuda": 8,
}  # `make mutants` tries all
# Files without a fault: declarations, the file of each instruction set, code that only a GPU runs.
WITHOUT_FAULTS = {
    *("bench/__init__.py", "fused_xent/__init__.py", "fused_xent/integrations/__init__.py"),
    *("csrc/xent_inline.h",),
    *("csrc/binding/cuda.h", "csrc/binding/cuda_device.cpp", "csrc/binding/cuda_device.h"),
    *("csrc/binding/layout.h", "csrc/binding/schemas.cpp", "csrc/binding/tensors.h"),
    *("csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx512_bf16.cpp"),
    *("csrc/cpu/portable.cpp", "csrc/README.md"),
    *("csrc/cpu/launch.h", "csrc/cuda/regimes.h"),
}


def spread(names, count):
    """Return this many names, evenly spread over the table."""
    names = list(names)
    return [names[i * len(names) // count] for i in range(count)]


CHOSEN = [(table, name) for table, count in SAMPLE.items() for name in spread(TABLES[table], count)]


@pytest.mark.parametrize("table", TABLES)
def test_faults_apply(table):
    for fault in TABLES[table].values():
        text = (ROOT / fault.path).read_text()
        assert fault.apply(text) != text
        assert fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


def test_every_file_has_faults():
    faults = [fault for table in TABLES.values() for fault in table.values()]
    assert len(faults) >= 150
    by_file = Counter(fault.path for fault in faults)
    folders = ("csrc/**/*.*", "fused_xent/**/*.py", "bench/*.py", "tests/compare.py")
    paths = {str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(folder)}
    assert set(by_file) == paths - WITHOUT_FAULTS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, emulator_builds):
    """The outcome of each fault of the sample."""
    chosen = [key for key in CHOSEN if not (key[0] == "cuda" and cuda_builds.MISSING)]
    runner = Runner(tmp_path_factory.mktemp("mutants"), 2, emulator_builds)
    native = [key for key in chosen if key[0] in NATIVE]
    assert not runner.unbroken(native)  # the tests of other faults run in this session anyway
    return {key: outcome for key, outcome, _ in runner.run(chosen)}


@pytest.mark.parametrize("key", CHOSEN, ids=lambda key: f"{key[0]}: {key[1]}")
def test_sample_is_found(outcomes, key):
    if key not in outcomes:
        pytest.skip(cuda_builds.MISSING)
    assert outcomes[key].verdict in ("found", "unseen"), outcomes[key].output[-3000:]
