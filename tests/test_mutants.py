"""The tables of faults are as large, wide and true as they say, and a sample of them is found."""

from collections import Counter
from pathlib import Path

import cuda_builds
import pytest
from mutants import TABLES
from mutants.runner import NATIVE, Runner

pytestmark = pytest.mark.cpu("of the code, not of a device")

ROOT = Path(__file__).parents[1]
SAMPLE = {"python": 4, "bench": 2, "binding": 2, "cpu": 3, "cuda": 8}  # `make mutants` tries all
# Files without a fault of their own: declarations, one file for each instruction set or device, and
# what only a GPU runs.
WITHOUT_FAULTS = {
    *("bench/__init__.py", "fused_xent/__init__.py", "csrc/xent_inline.h"),
    *("csrc/binding/cuda.h", "csrc/binding/cuda_device.cpp", "csrc/binding/cuda_device.h"),
    *("csrc/binding/schemas.cpp", "csrc/binding/tensors.h"),
    *("csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx512_bf16.cpp"),
    *("csrc/cpu/portable.cpp", "csrc/README.md"),
    *("csrc/cpu/launch.h", "csrc/cuda/launch.h", "csrc/cuda/plan.h", "csrc/cuda/regimes.h"),
}


def spread(names, count):
    """Return so many of the names, from all of the table."""
    names = list(names)
    return [names[i * len(names) // count] for i in range(count)]


CHOSEN = [(table, name) for table, count in SAMPLE.items() for name in spread(TABLES[table], count)]


@pytest.mark.parametrize("table", TABLES)
def test_faults_can_be_put_in(table):
    for fault in TABLES[table].values():
        text = (ROOT / fault.path).read_text()
        assert fault.apply(text) != text
        assert fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


def test_there_are_faults_of_every_file():
    faults = [fault for table in TABLES.values() for fault in table.values()]
    assert len(faults) >= 150
    by_file = Counter(fault.path for fault in faults)
    folders = ("csrc/**/*.*", "fused_xent/*.py", "bench/*.py", "tests/compare.py")
    paths = {str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(folder)}
    assert set(by_file) == paths - WITHOUT_FAULTS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, emulator_builds):
    """What the tests say of the faults of the sample."""
    chosen = [key for key in CHOSEN if not (key[0] == "cuda" and cuda_builds.MISSING)]
    runner = Runner(tmp_path_factory.mktemp("mutants"), 2, emulator_builds)
    native = [key for key in chosen if key[0] in NATIVE]
    assert not runner.unbroken(native)  # of the others, the tests are those of this very run
    return {key: outcome for key, outcome, _ in runner.run(chosen)}


@pytest.mark.parametrize("key", CHOSEN, ids=lambda key: f"{key[0]}: {key[1]}")
def test_sample_is_found(outcomes, key):
    if key not in outcomes:
        pytest.skip(cuda_builds.MISSING)
    assert outcomes[key].verdict in ("found", "unseen"), outcomes[key].output[-3000:]
