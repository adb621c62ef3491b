"""Plots throughput and memory against the number of classes, and rooflines, as PNG and SVG.

Writes every plot that the files have results for: throughput and memory need those of `sweep`, a
roofline those of `roofline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .cases import MODES, SWEPT
from .command import Parser
from .results import BASELINES, LABELS, Result, Run, Timing
from .roofline import points, roofs
from .tables import MODE_TITLES

FORMATS = ("png", "svg")
plt.rcParams["svg.hashsalt"] = "bench"  # otherwise the ids in an SVG are random
# One colour per provider, the same in every plot. The modes of fused_xent are shades of blue.
COLOURS = {
    "fused_xent": "#0b4f8a",
    "fused_xent inplace": "#2f8fd0",
    "fused_xent fused": "#70b0de",
    "torch eager": "#c0392b",
    "torch.compile": "#e67e22",
    "torch chunked": "#e67e22",
    "liger-kernel": "#27ae60",
    "quack-kernels": "#8e44ad",
    "quack-kernels inplace": "#b07cc6",
    "flash-attn": "#7f8c8d",
    "flash-attn inplace": "#b2babb",
    "apex": "#795548",
    "transformer-engine": "#16a085",
    "cut-cross-entropy": "#d4ac0d",
    "cut-cross-entropy, exact": "#7d6608",
}
MARKERS = {"forward": "o", "backward": "s", "both": "D", "step": "^"}


def series(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Groups results of sweeps by dtype, labels and options; a group varies only the classes."""
    alike: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.benchmark == "loss" and result.case.startswith(SWEPT):
            options = " ".join(f"{name} {value:g}" for name, value in result.options.items())
            labels = LABELS[result.labels]
            alike.setdefault((result.dtype, f"{labels} {options}".strip()), []).append(result)
    for one in alike.values():
        one.sort(key=lambda result: result.n_classes)
    return {key: one for key, one in alike.items() if len({r.n_classes for r in one}) > 1}


def against_classes(run: Run) -> Iterator[tuple[str, Figure]]:
    """Plots throughput and memory: a figure for each series, an axis for each mode."""
    for (dtype, what), results in series(run.results).items():
        modes = [
            mode
            for mode in ("forward", "backward", "both")
            if any(timing.mode == mode for result in results for timing in result.timings)
        ]
        if not modes:
            continue
        name = "-".join(f"{dtype} {what}".split()).replace(".", "_")
        title = f"{dtype} {what}".strip()
        for kind, draw in (("throughput", draw_throughput), ("memory", draw_memory)):
            figure, axes = plt.subplots(
                1, len(modes), figsize=(0.8 + 5.4 * len(modes), 3.8), sharey=True, squeeze=False
            )
            for mode, axis in zip(modes, axes[0], strict=True):
                draw(axis, results, mode)
                axis.set_title(f"{MODE_TITLES[mode]}, {title}", fontsize=10)
                classes_axis(axis, results)
            axes[0][0].set_ylim(bottom=0)
            for axis in axes[0]:
                label_lines(axis)
            finish(figure, axes[0], run)
            yield f"{kind}-{name}", figure


def lines_of(results: list[Result], mode: str) -> dict[str, list[Result]]:
    """Groups the results of a mode by provider; fused_xent comes last, so its lines are on top."""
    names = dict.fromkeys(t.provider for r in results for t in r.timings if t.mode == mode)
    found = {name: [r for r in results if r.find(mode, name)] for name in names}
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("fused_xent")))


def draw_throughput(axis: Axes, results: list[Result], mode: str) -> None:
    """Draws GB/s of the bytes that must be moved, and the copy's as a dashed line."""
    copies = [result for result in results if result.find("copy", "torch")]
    rates = [result.find("copy", "torch").bandwidth / 1e9 for result in copies]
    axis.plot([r.n_classes for r in copies], rates, color="black", linestyle="--", label="one copy")
    for name, found in lines_of(results, mode).items():
        timings = [result.find(mode, name) for result in found]
        middle = np.array([timing.bandwidth for timing in timings]) / 1e9
        edges = [[t.bytes / seconds / 1e9 for seconds in t.quartiles[::-1]] for t in timings]
        low, high = np.array(edges).T
        classes, colour = [result.n_classes for result in found], COLOURS.get(name)
        (line,) = axis.plot(classes, middle, marker=".", color=colour, label=name)
        axis.fill_between(classes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_ylabel("GB/s of the bytes that must be moved")


def draw_memory(axis: Axes, results: list[Result], mode: str) -> None:
    """Draws peak memory beyond logits and target, and the logits' size as a dashed line."""
    classes = [result.n_classes for result in results]
    sizes = [result.find("copy", "torch") for result in results]
    if all(sizes):
        logits = [timing.bytes / 2 / 1e6 for timing in sizes]
        axis.plot(classes, logits, color="black", linestyle="--", label="the logits")
    lines = lines_of(results, mode)
    for i, (name, found) in enumerate(lines.items()):
        peaks = [(r.n_classes, r.find(mode, name).peak_bytes) for r in found]
        known = [(n, peak / 1e6) for n, peak in peaks if peak is not None]
        if known:
            size = 3 + 2.2 * (len(lines) - 1 - i)  # nested rings, if lines coincide
            style = {"marker": "o", "markersize": size, "markerfacecolor": "none"}
            style |= {"color": COLOURS.get(name), "linewidth": 1, "clip_on": False}
            axis.plot(*zip(*known, strict=True), **style, label=name)
    axis.set_ylabel("MB at once beyond logits and target")


def label_lines(axis: Axes) -> None:
    """Writes the name of each line at its right end; moves names up that would overlap."""
    lowest, highest = axis.get_ylim()
    line_height = 0.06 * (highest - lowest)
    lines = sorted(axis.get_lines(), key=lambda line: line.get_ydata()[-1])
    at = lowest - line_height
    for line in lines:
        at = max(at + line_height, line.get_ydata()[-1])
        axis.annotate(
            line.get_label(),
            (1.01, at),
            xycoords=("axes fraction", "data"),
            color=line.get_color(),
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def classes_axis(axis: Axes, results: list[Result]) -> None:
    """Makes the x axis logarithmic, with ticks at as many numbers of classes as fit."""
    axis.set_xscale("log")
    shown: list[int] = []
    for n_classes in sorted({result.n_classes for result in results}):
        if not shown or n_classes > 1.45 * shown[-1]:
            shown.append(n_classes)
    axis.set_xticks(shown)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: thousands(round(x))))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params("x", labelsize=8)
    axis.set_xlabel("classes")


def thousands(n: int) -> str:
    """Formats a number, as in 1k, 32k, 128k."""
    return f"{n / 1000:.0f}k" if n >= 1000 else str(n)


def rooflines(run: Run) -> Iterator[tuple[str, Figure]]:
    """Plots one figure for each dtype that has a roof."""
    for dtype, roof in roofs(run).items():
        figure, axis = plt.subplots(figsize=(7.4, 4.8))
        found = list(points(run, dtype))
        intensities = [point.timing.intensity for point in found] + [roof.rate / roof.bandwidth]
        x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
        axis.plot(x, [roof.at(one) / 1e9 for one in x], color="black", linewidth=1.2)
        knee = roof.rate / roof.bandwidth
        for text, at, align, offset in (
            (f"memory, {roof.bandwidth / 1e9:.0f} GB/s", knee / 2, "right", (-6, 2)),
            (f"matrix products, {roof.rate / 1e9:.0f} GFLOP/s", 2 * knee, "left", (0, 5)),
        ):
            axis.annotate(
                text,
                (at, roof.at(at) / 1e9),
                textcoords="offset points",
                xytext=offset,
                ha=align,
                fontsize=8,
            )
        for point in found:
            timing = point.timing
            axis.plot(
                timing.intensity,
                timing.rate / 1e9,
                MARKERS[timing.mode],
                markersize=6,
                color=COLOURS.get(timing.provider),
                label=point.label,
                linestyle="none",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("operations for a byte that must be moved")
        axis.set_ylabel("GFLOP/s")
        axis.set_title(f"roofline, {dtype}", fontsize=10)
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
        finish(figure, [axis], run)
        yield f"roofline-{dtype}", figure


def finish(figure: Figure, axes: Iterable[Axes], run: Run) -> None:
    """Adds grids, and a line about the machine."""
    for axis in axes:
        axis.grid(True, which="major", color="#e0e0e0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.text(0.01, 0.01, run.summary, fontsize=6, color="#707070")


def chosen(run: Run, modes: list[str] | None, providers: list[str] | None) -> Run:
    """Returns the timings of these modes and providers, or of all, and the baselines."""

    def is_chosen(timing: Timing) -> bool:
        of_mode = not modes or timing.mode in modes
        return timing.mode in BASELINES or (
            of_mode and (not providers or timing.provider in providers)
        )

    results = [
        replace(result, timings=list(filter(is_chosen, result.timings))) for result in run.results
    ]
    return Run(run.environment, results)


def main(arguments: list[str]) -> int:
    """`python -m bench plot`."""
    command = Parser(prog="python -m bench plot", description=__doc__)
    command.add_argument("file", type=Path, nargs="+", help="--json files of one machine")
    what = "only this one, in the plots of a sweep; may be repeated"
    command.add_argument("--mode", action="append", choices=MODES, help=what)
    command.add_argument("--provider", action="append", metavar="NAME", help=what)
    out = "existing folder; default: that of the first file"
    command.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    options = command.parse_args(arguments)
    folder = options.out or options.file[0].parent
    if not folder.is_dir():
        command.error(f"--out must be an existing folder, got {folder}")
    try:
        runs = [Run.read_json(path) for path in options.file]
    except (OSError, ValueError) as error:
        command.error(str(error))
    run = Run(runs[0].environment, [result for one in runs for result in one.results])
    timings = [timing for result in run.results for timing in result.timings]
    names = dict.fromkeys(t.provider for t in timings if t.mode not in BASELINES)
    for name in options.provider or ():
        if name not in names:
            command.error(f"--provider must be one of {', '.join(names)}, got {name}")
    swept = chosen(run, options.mode, options.provider)
    n_figures = 0
    for name, figure in (*against_classes(swept), *rooflines(run)):
        for suffix in FORMATS:
            path = folder / f"{options.file[0].stem}-{name}.{suffix}"
            figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata(suffix))
            print(path)
        plt.close(figure)
        n_figures += 1
    if not n_figures:
        command.error(
            "a file must have a sweep over two numbers of classes, or a loss and a linear layer "
            "in one dtype, to be plotted: see sweep and roofline"
        )
    return 0


def metadata(suffix: str) -> dict[str, None]:
    """Leaves out the date: the same results give the same file."""
    return {"Date": None} if suffix == "svg" else {}
