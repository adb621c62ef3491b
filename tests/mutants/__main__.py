"""Applies the faults of the tables to the code, one at a time, and reports those no test finds.

    make mutants                                      all of them: about an hour on two cores
    make mutants ARGS="--table cuda softcap"          those of one table whose names say softcap

The table `integrations` needs the frameworks, and is left out where they are not installed:

    make integrations; make mutants RUN=.venv-integrations/bin/python ARGS="--table integrations"

The exit status is 1 if a fault survives or could not be tried.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from emulator.build import ROOT

from . import TABLES
from .runner import Runner


def can_run(table: str) -> bool:
    """Return False for a table whose tests need packages that are not installed."""
    return table != "integrations" or importlib.util.find_spec("peft") is not None


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose names contain one of these")
    parser.add_argument("--table", choices=TABLES, action="append", help="only this table")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="faults tried in parallel"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    arguments = parser.parse_args()
    tables = arguments.table or [table for table in TABLES if can_run(table)]
    chosen = [
        (table, name)
        for table in tables
        for name in TABLES[table]
        if not arguments.words or any(word in name for word in arguments.words)
    ]
    runner = Runner(arguments.folder, arguments.jobs, arguments.folder / "builds")
    broken = runner.unbroken(chosen)
    if broken:
        print(f"These tests must pass without a fault, and do not:\n{broken}")
        return 1
    return runner.report(runner.run(chosen))


if __name__ == "__main__":
    sys.exit(main())
