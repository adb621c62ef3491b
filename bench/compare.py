"""Compares two runs: what is faster, what is slower, and whether noise can explain it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from . import tables
from .command import Parser, between
from .results import BASELINES, Result, Run, Timing

LEAST = 0.02  # a smaller relative change never counts
# Differences in these can change the times without a change of the code.
MACHINE = ("cpu", "cores", "threads", "gpu", "driver", "torch instruction set", "torch")


@dataclass(frozen=True)
class Difference:
    """The same timing in both runs."""

    result: Result
    before: Timing
    after: Timing
    least: float

    @property
    def change(self) -> float:
        """Relative change of the median: 0.1 means that it takes 10 % longer."""
        return self.after.median / self.before.median - 1

    @property
    def noise(self) -> float:
        """The largest change that counts as noise: both interquartile ranges, at least `least`."""
        return max(self.before.noise + self.after.noise, self.least)

    @property
    def verdict(self) -> str:
        """Returns "slower", "faster", or "" if the change is within noise."""
        slowdown = max(self.change, -self.change / (1 + self.change))  # symmetric
        if slowdown <= self.noise:
            return ""
        return "slower" if self.change > 0 else "faster"


def differences(before: Run, after: Run, least: float) -> Iterator[Difference]:
    """Yields every timing that both runs have, except the baselines."""
    later = {result.key: result for result in after.results}
    for result in before.results:
        other = later.get(result.key)
        for timing in result.timings if other else ():
            match = other.find(timing.mode, timing.provider)
            if match and timing.mode not in BASELINES:
                yield Difference(result, timing, match, least)


def timings_of(run: Run) -> set[tuple]:
    """Returns (key of the result, mode, provider) of every timing, except the baselines."""
    return {
        (result.key, timing.mode, timing.provider)
        for result in run.results
        for timing in result.timings
        if timing.mode not in BASELINES
    }


def baselines(before: Run, after: Run) -> float | None:
    """Median change in the time of a copy of the logits; None if no case has it in both."""
    later = {result.key: result for result in after.results}
    changes = []
    for result in before.results:
        pair = [one and one.find("copy", "torch") for one in (result, later.get(result.key))]
        if all(pair):
            changes.append(pair[1].median / pair[0].median - 1)
    return sorted(changes)[len(changes) // 2] if changes else None


def milliseconds(seconds: float) -> str:
    """Formats milliseconds, with more digits below 1 ms: the overhead of a call."""
    return f"{seconds * 1e3:.2f}" if seconds > 1e-3 else f"{seconds * 1e3:.4f}"


def table_of(found: list[Difference]) -> Table:
    """Makes the table of one case."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    widths = {"": 39, "before ms": 9, "after ms": 9, "time": 6, "noise": 6, " ": 0}
    for i, (column, width) in enumerate(widths.items()):
        justify = "right" if 0 < i < 5 else "left"
        table.add_column(column, justify=justify, no_wrap=True, min_width=width)
    for one in found:
        table.add_row(
            f"  {tables.MODE_TITLES[one.before.mode]}, {one.before.provider}",
            *(milliseconds(timing.median) for timing in (one.before, one.after)),
            f"{one.change:+.0%}",
            f"{one.noise:.0%}",
            one.verdict,
            style={"slower": "red", "faster": "green"}.get(one.verdict, ""),
        )
    return table


def main(arguments: list[str]) -> int:
    """`python -m bench compare`: returns 1 if something is slower beyond noise."""
    command = Parser(prog="python -m bench compare", description=__doc__)
    command.add_argument("before", type=Path, help="file written by --json")
    command.add_argument("after", type=Path, help="another one")
    only = "compare only this one; may be repeated"
    command.add_argument("--provider", action="append", metavar="NAME", help=only)
    least = f"smaller relative changes do not count; default: {LEAST:g}"
    command.add_argument("--least", type=between(0, 10), default=LEAST, metavar="SHARE", help=least)
    options = command.parse_args(arguments)
    try:
        before, after = (Run.read_json(path) for path in (options.before, options.after))
    except (OSError, ValueError) as error:
        command.error(str(error))
    found = [
        one
        for one in differences(before, after, options.least)
        if not options.provider or one.before.provider in options.provider
    ]
    if not found:
        command.error("the files must have a case, mode and provider in common, they have none")
    out = tables.Output()
    for name in MACHINE:
        pair = [run.environment.get(name) for run in (before, after)]
        if pair[0] != pair[1]:
            out.print(f"{name} differs: {pair[0]}, {pair[1]}", style="yellow")
    copies = baselines(before, after)
    if copies is not None:
        out.print(f"time of a copy of the logits: {copies:+.0%}, median over cases")
    by_case: dict[str, list[Difference]] = {}
    for one in found:
        by_case.setdefault(one.result.title, []).append(one)
    for title, differences_of_case in by_case.items():
        out.print()
        out.print(title, style="bold")
        out.print(table_of(differences_of_case))
    verdicts = [one.verdict for one in found]
    slower, faster = verdicts.count("slower"), verdicts.count("faster")
    within = len(found) - slower - faster
    out.print(
        "\ntime: change of the median, not corrected for the change of the copy. "
        "noise: sum of both interquartile ranges, or --least if that is larger."
    )
    out.print(
        f"{len(found)} compared: {slower} slower, {faster} faster, {within} within noise",
        style="bold",
    )
    for path, lost in (
        (options.after, timings_of(before) - timings_of(after)),
        (options.before, timings_of(after) - timings_of(before)),
    ):
        by_provider = Counter(provider for _, _, provider in lost)
        for provider, count in sorted(by_provider.items()):
            if options.provider and provider not in options.provider:
                continue
            out.print(f"{provider}: {count} timings are missing in {path}", style="yellow")
    return 1 if slower else 0
