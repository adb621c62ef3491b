"""A copy of the project in which faults are tried one at a time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from emulator.build import ROOT

from .fault import Fault
from .library import build_library

IGNORED = shutil.ignore_patterns(*(".*", "build", "dist", "__pycache__", "*.egg-info"))
LONGEST = 1800  # seconds for the tests of one fault, which may loop forever
LIBRARY = "fused_xent/_C.abi3.so"


class Outcome(NamedTuple):
    """The result of running the tests of a fault."""

    verdict: str  # "found", "SURVIVED", "unseen", or "INVALID" if the tests could not run
    output: str


class Tree:
    """A copy of the project in a folder, and the build folder that all copies share."""

    def __init__(self, folder: Path, builds: Path) -> None:
        """Copy the project in its current state."""
        self.folder, self.builds = folder, builds
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, ignore=IGNORED)

    def run(self, tests, *options: str) -> subprocess.CompletedProcess:
        """Run these tests in the copy."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        own = {"FUSED_XENT_TEST_BUILDS": str(self.builds), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [*command, *tests],
            cwd=self.folder,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LONGEST,
        )

    def use_library(self) -> None:
        """Use the library built from this copy's csrc."""
        self._replace_library(build_library(self.folder, self.builds))

    def restore_library(self) -> None:
        """Use the project's own library again."""
        self._replace_library(ROOT / LIBRARY)

    def _replace_library(self, path: Path) -> None:
        (self.folder / LIBRARY).unlink(missing_ok=True)  # not overwritten, since it may be in use
        shutil.copy2(path, self.folder / LIBRARY)

    def attempt(self, fault: Fault, is_native: bool) -> Outcome:
        """Apply a fault, run its tests, and undo it. is_native: the fault is in _C."""
        path = self.folder / fault.path
        text = path.read_text()
        path.write_text(fault.apply(text))
        try:
            if is_native:
                self.use_library()
            result = self.run(fault.tests, "-x")
        except subprocess.TimeoutExpired:
            return Outcome("found", "the tests do not end")
        except RuntimeError as error:
            return Outcome("INVALID", str(error))
        finally:
            path.write_text(text)
            if is_native:
                self.restore_library()
        return Outcome(_verdict(fault, result.returncode), result.stdout)


def _verdict(fault: Fault, status: int) -> str:
    """Return the verdict for pytest's exit status."""
    if status == 0:
        return "unseen" if fault.unseen else "SURVIVED"
    if status == 1 or status < 0:  # a test failed, or a signal ended it
        return "INVALID" if fault.unseen else "found"
    return "INVALID"  # no test ran: wrong test name, or another error
