"""How near losses come to what this machine can do: its memory's bandwidth, or its arithmetic.

The roof is the lesser of the bandwidth (of a copy or a read of the logits, whichever is faster)
times the operations a byte, and the rate of bare matrix products in the same dtype. A loss lies
under its slope, a linear layer with its loss under its flat part. What finds a part of the logits
still in a cache, as a backward after its forward may, can lie above. `plot` draws it.
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

CASES = {"cpu": ("llama2", "llama2"), "cuda": ("llama3", "llama3-4k")}  # of the loss, linear
QUICK_LINEAR = {"cpu": "small", "cuda": "llama3-4k"}


@dataclass(frozen=True)
class Roof:
    """Of one dtype."""

    bandwidth: float  # bytes a second
    rate: float  # operations a second

    def at(self, intensity: float) -> float:
        """Operations a second that a provider with so many operations a byte can reach."""
        return min(self.bandwidth * intensity, self.rate)


@dataclass(frozen=True)
class Point:
    """One timing under its roof."""

    benchmark: str
    timing: Timing

    @property
    def label(self) -> str:
        """The mode and the provider."""
        what = "linear" if self.benchmark == "linear" else tables.MODE_TITLES[self.timing.mode]
        return f"{what}, {self.timing.provider}"


def roofs(run: Run) -> dict[str, Roof]:
    """By dtype, where both a loss and a linear layer were measured."""
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
    """All that was measured in a dtype, but for what makes the roof."""
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
