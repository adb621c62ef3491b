"""Writes the README's tables of figures from the files that they are measured in.

A table stands between two comments, of which the first names the file of `python -m bench --json`
and, where one mode alone is wanted, the mode:

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
    """The README's text with tables made anew."""

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
    print(f"{len(TABLE.findall(text))} tables, {'changed' if written != text else 'as they were'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
