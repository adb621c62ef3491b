"""Formats results as tables for a terminal and for the README."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from .results import BASELINES, EAGER, Result, Timing

WIDTH = 100  # if stdout is not a terminal
MODE_TITLES = {
    "forward": "forward (no grad)",
    "backward": "backward",
    "both": "forward + backward",
    "step": "loss and both gradients",
    "host forward": "forward (no grad), host time",
    "host both": "forward + backward, host time",
}
LOSS_COLUMNS = ("", "ms", "±", "MB", "GB/s", "of copy", "vs eager", "memory MB")
LINEAR_COLUMNS = ("", "ms", "±", "GFLOP/s", "x bare", "vs eager", "memory MB", "error")
OVERHEAD_COLUMNS = ("", "us", "±", "x eager", "kernels")
NOTES = {
    "loss": "MB: must be moved. of copy: share of the copy's GB/s. memory: peak beyond logits and "
    "target; for backward, that of the whole step.",
    "linear": "x bare: time divided by that of the bare products. memory: peak beyond inputs and "
    "gradients. error: of grad_weight, relative to float64.",
    "overhead": "us: microseconds per call. x eager: time divided by torch eager's. kernels: "
    "launched per call.",
}
DASH = "-"


class Output(Console):
    """Writes to stdout, in colour if that is a terminal. Text in brackets is not markup."""

    def __init__(self) -> None:
        """Takes the terminal's width, or `WIDTH` if stdout is not a terminal."""
        options = {"highlight": False, "markup": False, "emoji": False}
        has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
        super().__init__(**options, width=None if has_width else WIDTH)

    def on_broken_pipe(self) -> NoReturn:
        """Leaves the error to `bench.__main__.run`; rich would exit with status 1."""
        raise BrokenPipeError


def show(result: Result, out: Output) -> None:
    """Prints the table of one case."""
    columns, cells_of = TABLES[result.benchmark]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for mode, title in MODE_TITLES.items():
        timings = [timing for timing in result.timings if timing.mode == mode]
        if timings and mode != "step":  # the only mode of a linear layer
            table.add_row(title, style="italic")
        fastest = min((timing.median for timing in timings), default=0.0)
        for timing in timings:
            style = "bold" if timing.provider.startswith("fused_xent") else ""
            if timing.median == fastest:
                style += " green"
            table.add_row(f"  {timing.provider}", *cells_of(result, timing), style=style)
    for provider in result.failures:
        table.add_row(f"  {provider}", *[DASH] * (len(columns) - 1), style="red")
    out.print()
    out.print(result.title, style="bold")
    baselines = [timing for timing in result.timings if timing.mode in BASELINES]
    if baselines:
        rates = (
            f"{t.mode} {t.median * 1e3:.2f} ms, {t.bandwidth / 1e9:.1f} GB/s" for t in baselines
        )
        out.print("only the logits: " + "; ".join(rates), style="dim")
    out.print(table)
    for line in reasons(result):
        out.print(f"  {DASH} {line}", style="dim")


def notes(results: Iterable[Result]) -> Iterator[str]:
    """Explains the columns."""
    yield "Times are medians. ±: half the interquartile range, relative to the median."
    yield from dict.fromkeys(NOTES[result.benchmark] for result in results)


def reasons(result: Result) -> list[str]:
    """Lists the providers without timings, grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for provider, reason in {**result.absent, **result.failures}.items():
        by_reason.setdefault(reason, []).append(provider)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def loss_cells(result: Result, timing: Timing) -> tuple[str, ...]:
    """Returns the cells of a row, without the provider's name."""
    return (
        f"{timing.median * 1e3:.2f}",
        f"{timing.noise / 2:.0%}",
        f"{timing.bytes / 1e6:.1f}",
        f"{timing.bandwidth / 1e9:.1f}",
        percent(result.share(timing, "copy")),
        times(result.ratio(timing, EAGER)),
        megabytes(timing.peak_bytes),
    )


def linear_cells(result: Result, timing: Timing) -> tuple[str, ...]:
    """Returns the cells of a row, without the provider's name."""
    error = result.errors.get(timing.provider, {}).get("grad_weight")
    bare = result.find("step", "bare products")
    return (
        f"{timing.median * 1e3:.1f}",
        f"{timing.noise / 2:.0%}",
        f"{timing.rate / 1e9:.4g}",
        f"{timing.median / bare.median:.2f}" if bare else DASH,
        times(result.ratio(timing, EAGER)),
        megabytes(timing.peak_bytes),
        f"{error:.1e}" if error is not None else DASH,
    )


def overhead_cells(result: Result, timing: Timing) -> tuple[str, ...]:
    """Returns the cells of a row, without the provider's name."""
    eager = result.find(timing.mode, EAGER)
    return (
        f"{timing.median * 1e6:.1f}",
        f"{timing.noise / 2:.0%}",
        f"{timing.median / eager.median:.2f}" if eager else DASH,
        DASH if timing.kernels is None else str(timing.kernels),
    )


TABLES = {  # benchmark: (columns, function that fills a row)
    "loss": (LOSS_COLUMNS, loss_cells),
    "linear": (LINEAR_COLUMNS, linear_cells),
    "overhead": (OVERHEAD_COLUMNS, overhead_cells),
}


def percent(share: float | None) -> str:
    """Formats a share of 1 as a percentage."""
    return DASH if share is None else f"{share:.0%}"


def times(ratio: float | None) -> str:
    """Formats a ratio, as in 2.0x."""
    return DASH if ratio is None else f"{ratio:.1f}x"


def megabytes(size: int | None) -> str:
    """Formats bytes as megabytes."""
    return DASH if size is None else f"{size / 1e6:.1f}"


def markdown(
    results: Iterable[Result], mode: str | None = None, has_memory: bool = False
) -> Iterator[str]:
    """Yields the lines of the README's tables, for one mode if it is given.

    Losses have a column for each provider, or with has_memory a line, which has its memory too.
    """
    results = list(results)
    modes = [mode] if mode else list(MODE_TITLES)
    parts = {
        "loss": lambda found: (memory_markdown if has_memory else loss_markdown)(found, modes),
        "linear": linear_markdown,
        "overhead": lambda found: overhead_markdown(found, modes),
    }
    is_first = True
    for benchmark, lines in parts.items():
        if found := [result for result in results if result.benchmark == benchmark]:
            if not is_first:
                yield ""
            yield from lines(found)
            is_first = False


def loss_markdown(results: list[Result], modes: list[str]) -> Iterator[str]:
    """Yields a row for each case and mode, with a column for each provider."""
    timings = [t for result in results for t in result.timings if t.mode in modes]
    names = dict.fromkeys(timing.provider for timing in timings)
    modes = [mode for mode in modes if any(timing.mode == mode for timing in timings)]
    first = MODE_TITLES[modes[0]] if len(modes) == 1 else "case"
    yield f"| {' | '.join([first, 'one copy', *names])} |"
    yield "|---|" + "---:|" * (len(names) + 1)
    for result in results:
        for mode in modes:
            found = [result.find(mode, name) for name in names]
            if not any(found):
                continue
            copy = result.find("copy", "torch")
            title = result.title.replace("  ", " ")
            if len(modes) > 1:
                title += f", {MODE_TITLES[mode]}"
            cells = [f"{copy.median * 1e3:.2f}" if copy else DASH]
            cells += [loss_markdown_cell(result, timing) for timing in found]
            yield f"| {' | '.join([title, *cells])} |"


def loss_markdown_cell(result: Result, timing: Timing | None) -> str:
    """Milliseconds; except for torch, also the speedups over torch eager and torch.compile."""
    if timing is None:
        return DASH
    cell = f"{timing.median * 1e3:.2f}"
    ratios = [result.ratio(timing, f"torch{kind}") for kind in (" eager", ".compile")]
    if timing.provider.startswith("torch") or None in ratios:
        return cell
    return f"{cell} ({' / '.join(map(times, ratios))})"


def memory_markdown(results: list[Result], modes: list[str]) -> Iterator[str]:
    """Yields a row for each case, mode and provider."""
    yield "| case | | ms | memory, MB |"
    yield "|---|---|---:|---:|"
    for result in results:
        for mode in modes:
            title = f"{result.title.replace('  ', ' ')}, {MODE_TITLES[mode]}"
            for timing in result.timings:
                if timing.mode == mode:
                    ms, _, _, _, _, _, memory = loss_cells(result, timing)
                    yield f"| {title} | {timing.provider} | {ms} | {memory} |"
                    title = ""


def linear_markdown(results: list[Result]) -> Iterator[str]:
    """Yields a row for each case and provider."""
    head = ["rows x features x classes", "", "ms", "x bare products", "memory, MB"]
    yield f"| {' | '.join([*head, 'error of `grad_weight`'])} |"
    yield "|---|---|---:|---:|---:|---:|"
    for result in results:
        title = f"{'x'.join(map(str, result.shape))} {result.dtype}"
        for timing in result.timings:
            ms, _, _, bare, _, memory, error = linear_cells(result, timing)
            yield f"| {title} | {timing.provider} | {ms} | {bare} | {memory} | {error} |"
            title = ""
        for provider, reason in result.failures.items():
            yield f"| {title} | {provider}: {reason} | {DASH} | {DASH} | {DASH} | {DASH} |"


def overhead_markdown(results: list[Result], modes: list[str]) -> Iterator[str]:
    """Yields a row for each case and mode, with a column for each provider."""
    timings = [t for result in results for t in result.timings if t.mode in modes]
    names = dict.fromkeys(timing.provider for timing in timings)
    yield f"| microseconds per call (x eager) | {' | '.join(names)} |"
    yield "|---|" + "---:|" * len(names)
    for result in results:
        for mode in modes:
            found = [result.find(mode, name) for name in names]
            if any(found):
                title = f"{result.title.replace('  ', ' ')}, {MODE_TITLES[mode]}"
                cells = [overhead_markdown_cell(result, timing) for timing in found]
                yield f"| {' | '.join([title, *cells])} |"


def overhead_markdown_cell(result: Result, timing: Timing | None) -> str:
    """Microseconds; except for torch eager, also the time divided by torch eager's."""
    if timing is None:
        return DASH
    us, _, ratio, _ = overhead_cells(result, timing)
    return us if timing.provider == EAGER or ratio == DASH else f"{us} ({ratio})"
