"""Measures how close losses come to the limits of this machine: memory bandwidth and arithmetic.

The roof is the smaller one of two rates: the bandwidth (of a copy or a read of the logits,
whichever is faster) times the operations per byte, and the rate of bare matrix products in the same
dtype. Bandwidth limits a loss, arithmetic limits a linear layer with its loss. A backward can be
above the roof if a part of the logits is still in a cache after its forward. `plot` draws the roof.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table

from . import linear, loss, tables
from .cases import DTYPES, MODES, SUITES
from .command import Parser, measure_all
from .linear import BARE
from .results import BASELINES, Run, Timing

CASES = {"cpu": ("llama2", "llama2"), "cuda": ("llama3", "llama3-4k")}  # (of loss, of linear)
QUICK_LINEAR = {"cpu": "small", "cuda": "llama3-4k"}


@dataclass(frozen=True)
class Roof:
    """The limits of the machine in one dtype."""

    bandwidth: float  # bytes per second
    rate: float  # operations per second

    def at(self, intensity: float) -> float:
        """Operations per second that can be reached with `intensity` operations per byte."""
        return min(self.bandwidth * intensity, self.rate)


@dataclass(frozen=True)
class Point:
    """One timing, as a point under the roof."""

    benchmark: str
    timing: Timing

    @property
    def label(self) -> str:
        """The mode and the provider, for a table or a legend."""
        what = "linear" if self.benchmark == "linear" else tables.MODE_TITLES[self.timing.mode]
        return f"{what}, {self.timing.provider}"


def roofs(run: Run) -> dict[str, Roof]:
    """Returns the roof of each dtype that has both a loss and a linear layer measured."""
    found = {}
    for dtype in DTYPES:
        bandwidths, rates = [0.0], [0.0]
        for result in run.results:
            for timing in result.timings if result.dtype == dtype else ():
                if timing.mode in BASELINES:
                    bandwidths.append(timing.bandwidth)
                elif timing.provider == BARE:
                    rates.append(timing.rate)
        if max(bandwidths) and max(rates):
            found[dtype] = Roof(max(bandwidths), max(rates))
    return found


def points(run: Run, dtype: str) -> Iterator[Point]:
    """Yields all timings in a dtype, except those that define the roof."""
    for result in run.results:
        for timing in result.timings if result.dtype == dtype else ():
            if timing.mode not in BASELINES and timing.provider != BARE:
                yield Point(result.benchmark, timing)


def main(arguments: list[str]) -> int:
    """`python -m bench roofline`."""
    command = Parser(prog="python -m bench roofline", description=__doc__)
    command.add_common([*dict.fromkeys([*loss.ADAPTERS, *linear.ADAPTERS])])
    options = command.parse_args(arguments)
    options.mode = list(MODES)
    dtypes = dict.fromkeys(options.dtype or linear.DEFAULT_DTYPES[options.device])
    loss_case, linear_case = CASES[options.device]
    cases = linear.CASES[options.device]
    if options.quick:
        cases = linear.QUICK[options.device]
        linear_case = QUICK_LINEAR[options.device]
    jobs = []
    for dtype in dtypes:
        jobs.append(loss.job(SUITES[options.device].cases[loss_case], dtype, options))
        jobs.append(linear.job(linear_case, cases[linear_case], dtype, options))
    run, status = measure_all(command, options, jobs)
    if not options.markdown:
        show(run)
    return status


def show(run: Run) -> None:
    """Prints a table for each dtype."""
    out = tables.Output()
    for dtype, roof in roofs(run).items():
        out.print()
        out.print(
            f"roofline  {dtype}: memory {roof.bandwidth / 1e9:.0f} GB/s, "
            f"matrix products {roof.rate / 1e9:.0f} GFLOP/s",
            style="bold",
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for i, column in enumerate(("", "op/byte", "GFLOP/s", "roof", "of roof")):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for point in points(run, dtype):
            timing, reachable = point.timing, roof.at(point.timing.intensity)
            table.add_row(
                f"  {point.label}",
                f"{timing.intensity:.3g}",
                f"{timing.rate / 1e9:.1f}",
                f"{reachable / 1e9:.1f}",
                f"{timing.rate / reachable:.0%}",
                style="bold" if timing.provider.startswith("fused_xent") else "",
            )
        out.print(table)
