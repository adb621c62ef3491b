"""What the commands of the benchmark have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .device import DEVICES, default_device, why_not


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_common(self) -> None:
        """Adds what every command takes beside its cases."""
        device = f"default here: {default_device()}"
        self.add_argument("--device", choices=DEVICES, default=default_device(), help=device)
        self.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
        self.add_argument("--markdown", action="store_true", help="print a table in Markdown")

    def check_common(self, options: argparse.Namespace) -> None:
        """Ends the program where nothing can be measured or written."""
        if options.json and not options.json.parent.is_dir():
            self.error(f"--json must be in an existing folder, got {options.json}")
        if reason := why_not(options.device):
            self.error(f"--device {options.device} has nothing to measure: {reason}")


def at_least(minimum: int) -> Callable[[str], int]:
    """A type of argument: integers from `minimum` on."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            message = f"must be an integer of at least {minimum}, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return convert
