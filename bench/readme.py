"""Writes the tables of README.md and docs/ from the result files in bench/results.

A table stands between two comments. The first one names the file that `python -m bench --json`
wrote and, to show only one mode, that mode. With the word memory, losses have a line for each
provider, with its memory:

    <!-- bench/results/machine.json both -->
    <!-- end -->

    <!-- bench/results/machine.json both memory -->
    <!-- end -->
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from . import tables
from .results import Run

ROOT = Path(__file__).parents[1]
TABLE = re.compile(
    r"(<!-- (bench/results/\S+\.json)(?: (\w+))?(?: (memory))? -->\n).*?(<!-- end -->)", re.S
)


def pages() -> list[Path]:
    """Returns the files that may have tables: README.md, and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """Returns the text of a page with its tables written again."""

    def table(match: re.Match[str]) -> str:
        begin, file, mode, memory, end = match.groups()
        lines = tables.markdown(Run.read_json(ROOT / file).results, mode, bool(memory))
        return "\n".join([begin, *lines, "", end])

    return TABLE.sub(table, text)


def main() -> int:
    """`make readme-tables`. Writes no page if one of the tables cannot be made."""
    texts = {page: page.read_text() for page in pages()}
    try:
        written = {page: with_tables(text) for page, text in texts.items()}
    except (OSError, ValueError) as error:
        print(f"python -m bench.readme: error: {error}", file=sys.stderr)
        return 2
    for page, text in written.items():
        page.write_text(text)
    n_tables = sum(len(TABLE.findall(text)) for text in texts.values())
    print(f"{n_tables} tables, {'changed' if written != texts else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
