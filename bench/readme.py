"""Writes the README's tables from the result files in bench/results.

A table stands between two comments. The first one names the file that `python -m bench --json`
wrote and, to show only one mode, that mode:

    <!-- bench/results/machine.json both -->
    <!-- end -->
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from . import tables
from .results import Run

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- (bench/results/\S+\.json)(?: (\w+))? -->\n).*?(<!-- end -->)", re.S)


def with_tables(text: str) -> str:
    """Returns the README's text with its tables written again."""

    def table(match: re.Match[str]) -> str:
        begin, file, mode, end = match.groups()
        lines = tables.markdown(Run.read_json(ROOT / file).results, mode)
        return "\n".join([begin, *lines, "", end])

    return TABLE.sub(table, text)


def main() -> int:
    """`make readme-tables`."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    try:
        written = with_tables(text)
    except (OSError, ValueError) as error:
        print(f"python -m bench.readme: error: {error}", file=sys.stderr)
        return 2
    readme.write_text(written)
    print(f"{len(TABLE.findall(text))} tables, {'changed' if written != text else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
