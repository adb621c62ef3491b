"""A copy of the project, in which faults are tried one at a time."""

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
LONGEST = 1800  # seconds that the tests of one fault may take: it may be an endless loop
LIBRARY = "fused_xent/_C.abi3.so"


class Outcome(NamedTuple):
    """What the tests said."""

    verdict: str  # "found", "SURVIVED", "unseen", or "INVALID" if they could not say
    output: str


class Tree:
    """A copy of the project in a folder, with builds that copies share in another."""

    def __init__(self, folder: Path, builds: Path) -> None:
        """Copy the project as it is now."""
        self.folder, self.builds = folder, builds
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, ignore=IGNORED)

    def run(self, tests, *options: str) -> subprocess.CompletedProcess:
        """Run some of its tests."""
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
        """Let the tests run with the library of this copy's csrc."""
        self._replace_library(build_library(self.folder, self.builds))

    def restore_library(self) -> None:
        """Let the tests run with the project's own library."""
        self._replace_library(ROOT / LIBRARY)

    def _replace_library(self, path: Path) -> None:
        (self.folder / LIBRARY).unlink(missing_ok=True)  # not written over: it may be in use
        shutil.copy2(path, self.folder / LIBRARY)

    def attempt(self, fault: Fault, is_native: bool) -> Outcome:
        """Put a fault in, run its tests, and take it out again. is_native: it is in _C."""
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
    """Return what pytest's exit status says of a fault."""
    if status == 0:
        return "unseen" if fault.unseen else "SURVIVED"
    if status == 1 or status < 0:  # a test failed, or a signal ended it
        return "INVALID" if fault.unseen else "found"
    return "INVALID"  # nothing was tried: no such test, or an error of another kind
