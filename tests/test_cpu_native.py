"""The CPU kernels without torch, under the sanitizers: tests/native/kernel_check.cpp."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu("kernels of the CPU")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "cpu"
CHECK = ROOT / "tests" / "native" / "kernel_check.cpp"
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "portable")
# -Og compiles the kernels in half the time of -O1, and that is where the time goes.
COMPILE = ("g++", "-std=c++20", "-Wno-psabi", "-g1", "-Og", "-c")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)


def run(*command: object, **env: str) -> str:
    """Run a command, fail with what it printed unless it succeeds, return that."""
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | env,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def skip_unless_linkable(folder: Path, sanitizer: tuple[str, ...]) -> None:
    source = folder / "probe.cpp"
    source.write_text("int main() {}")
    command = ["g++", *sanitizer, source, "-o", folder / "probe"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"g++ cannot link with {sanitizer[0]}")


def can_run(capability: str) -> bool:
    """Return False for instruction sets that this machine surely has not."""
    info = Path("/proc/cpuinfo")
    return "avx512" not in capability or not info.exists() or "avx512f" in info.read_text()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The check by sanitizer: what runs here under ADDRESS, what portable needs under THREAD."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("native")
    for sanitizer in (ADDRESS, THREAD):
        skip_unless_linkable(folder, sanitizer)

    def compile_one(job: tuple[str, ...]) -> Path:
        source, *flags = job
        target = folder / f"{Path(source).stem}{''.join(flags)}.o"
        run(*COMPILE, *flags, source, "-o", target)
        return target

    # Each program has the kernels that it runs, which take long to compile.
    kept = {ADDRESS: [name for name in CAPABILITIES if can_run(name)], THREAD: ["portable"]}
    jobs = {}
    for sanitizer, names in kept.items():
        left_out = [name for name in CAPABILITIES if name not in names]
        without = [f"-DFUSED_XENT_WITHOUT_{name.upper()}" for name in left_out]
        kernels = [path for path in sorted(KERNELS.glob("*.cpp")) if path.stem not in left_out]
        jobs[sanitizer] = [(str(path), *sanitizer, *without) for path in kernels]
        # The check itself has no threads.
        of_check = () if sanitizer == THREAD else sanitizer
        jobs[sanitizer].append((str(CHECK), *of_check))
    distinct = [*jobs[ADDRESS], *jobs[THREAD]]
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(distinct, pool.map(compile_one, distinct), strict=True))
    found = {}
    for number, (sanitizer, parts) in enumerate(jobs.items()):
        found[sanitizer] = folder / f"kernel_check_{number}"
        linked = [objects[part] for part in parts]
        run("g++", *sanitizer, "-pthread", *linked, "-o", found[sanitizer])
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_under_address_and_undefined_sanitizers(programs, capability):
    env = {"FUSED_XENT_CPU_CAPABILITY": capability}
    if (
        not can_run(capability)
        or run(programs[ADDRESS], "--capability", **env) != f"capability: {capability}\n"
    ):
        pytest.skip(f"this machine has no {capability}")
    assert "runtime error" not in run(programs[ADDRESS], **env)


def test_threads_under_thread_sanitizer(programs):
    run(programs[THREAD], "--small", "--threads", "3", FUSED_XENT_CPU_CAPABILITY="portable")
