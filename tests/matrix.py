"""Tests one binary under several torch, Python and instruction sets: run by ``make matrix``.

`make matrix` builds the wheel. Each pair of torch and Python has an environment in .venv-matrix,
with that wheel; in each one, the tests below run under each instruction set, about half a minute of
processor time a cell. The tests run in a copy of tests/, so that they import the installed package.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-matrix"
TORCHS = ("2.10.0", "2.13.0", "newest")  # the oldest supported, that of .venv, PyPI's newest
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CAPABILITIES = ("portable", "avx2", "avx512")
TESTS = ("functional", "nn", "errors", "layouts", "overwriting", "linear_errors", "random")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "expecttest", "numpy")
# Prints the instruction set in use, the versions, and where the package is.
ABOUT = (
    "import platform, torch, fused_xent as f; "
    "print(f.cpu_capability(), torch.__version__, platform.python_version(), f.__file__)"
)


class Cell(NamedTuple):
    """What a line of the table is about."""

    torch: str
    python: str
    capability: str
    outcome: str  # "passed", "FAILED" or "skipped"
    about: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=TORCHS, help=f"default: {' '.join(TORCHS)}")
    parser.add_argument("--python", nargs="+", help="versions; default: see pairs() in this file")
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES)
    return parser.parse_args()


def pythons() -> dict[str, str]:
    """Return the command of each version of Python that is installed."""
    found = {}
    for version in PYTHONS:
        command = shutil.which(f"python{version}")
        is_working = (
            command and not subprocess.run([command, "-c", ""], capture_output=True).returncode
        )
        if is_working:
            found[version] = command
    return found


def pairs(torchs: list[str], given: list[str] | None, installed: dict[str, str]) -> list[tuple]:
    """Return torch and Python of each environment.

    By default each torch is tested with this Python, the oldest one with the oldest Python too, and
    the newest one with the newest Python.
    """
    if given:
        return [(torch, python) for torch in torchs for python in given]
    own = f"3.{sys.version_info.minor}"
    found = [(torch, own) for torch in torchs]
    versions = list(installed)
    more = [("2.10.0", versions[0]), ("newest", versions[-1])]
    return found + [pair for pair in more if pair[0] in torchs and pair not in found]


def environment(torch: str, command: str, version: str, wheel: Path) -> Path:
    """Return the Python of an environment with this torch and the wheel; made if needed."""
    folder = FOLDER / f"{version}-{torch}"
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if torch == "newest" or not (folder / "ready").exists():  # there may be a newer one today
        subprocess.run([command, "-m", "venv", str(folder)], check=True)
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        subprocess.run([*pip, "--upgrade", wanted, *TOOLS], check=True)
        (folder / "ready").touch()
    subprocess.run([*pip, "--no-deps", "--no-index", "--force-reinstall", str(wheel)], check=True)
    return python


def copy_of_tests() -> Path:
    """Return a folder with the tests and their settings, but without the package."""
    folder = FOLDER / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_cell(python: Path, capability: str, folder: Path) -> tuple[str, str]:
    """Run the tests under an instruction set; return the outcome, and what it is about."""
    env = {**os.environ, "FUSED_XENT_CPU_CAPABILITY": capability, "PYTHONPATH": ""}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(python), *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

    about = run("-W", "ignore", "-c", ABOUT)
    if about.returncode:
        return "FAILED", about.stderr.strip().splitlines()[-1]
    chosen, torch, version, path = about.stdout.split()
    if chosen != capability:
        return "skipped", f"this processor has no {capability}"
    assert str(FOLDER) in path, path
    start = time.monotonic()
    files = [f"tests/test_{name}.py" for name in TESTS]
    result = run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files)
    name = f"{version}-{torch}-{capability}.log"
    (FOLDER / name).write_text(result.stdout + result.stderr)
    last = re.sub(r" in .*", "", (result.stdout.strip().splitlines() or ["no output"])[-1])
    about_run = f"torch {torch}, Python {version}: {last}, {time.monotonic() - start:.0f} s"
    if result.returncode:
        return "FAILED", f"{about_run}, see .venv-matrix/{name}"
    return "passed", about_run


def cells(options: argparse.Namespace, wheel: Path) -> list[Cell]:
    """Run all cells; print each one when it is done."""
    installed, folder, found = pythons(), copy_of_tests(), []

    def note(*cell: str) -> None:
        found.append(Cell(*cell))
        print("  ".join(cell), flush=True)

    for torch, version in pairs(list(options.torch), options.python, installed):
        if version not in installed:
            note(torch, version, "-", "skipped", f"there is no python{version} on the PATH")
            continue
        try:
            python = environment(torch, installed[version], version, wheel)
        except subprocess.CalledProcessError as error:
            note(torch, version, "-", "FAILED", f"cannot install it: {error}")
            continue
        for capability in options.capability:
            note(torch, version, capability, *run_cell(python, capability, folder))
    missing = [version for version in PYTHONS if version not in installed]
    if missing and not options.python:
        note("-", " ".join(missing), "-", "skipped", "not on the PATH")
    return found


def main() -> int:
    """Return the exit status: 1 if a cell failed."""
    options = parse()
    FOLDER.mkdir(exist_ok=True)
    found = cells(options, options.wheel.resolve())
    print(f"\n{'torch':8} {'Python':8} {'kernels':9} outcome")
    for cell in found:
        print(f"{cell.torch:8} {cell.python:8} {cell.capability:9} {cell.outcome}: {cell.about}")
    return int(any(cell.outcome == "FAILED" for cell in found))


if __name__ == "__main__":
    sys.exit(main())
