"""What was env, for three readers: a terminal, the README and other programs."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fused_xent

from .device import gpu_environment

MODE_TITLES = {
    "forward": "forward (no grad)",
    "backward": "backward",
    "both": "forward + backward",
}
COLUMNS = ("ms", "quartiles", "GB/s", "of copy", "of read", "x copy", "vs eager", "vs compile")
WIDTHS = (8, 17, 6, 9, 9, 8, 10, 12)


@dataclass
class Timing:
    """The samples of one provider in one mode, or of a baseline (mode "copy" or "read")."""

    mode: str
    provider: str
    bytes: int  # that the algorithm must move
    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds, the first and the third."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes / self.median


@dataclass
class Result:
    """All timings of one case in one dtype, taken in one interleaved run."""

    case: str
    shape: tuple[int, ...]
    soft: bool
    dtype: str
    timings: list[Timing]
    errors: dict[str, dict[str, float]]  # by provider: relative to float64
    failures: dict[str, str]  # by provider: why it was not timed
    peak_bytes: dict[str, int]  # by provider: of a step, beyond logits and target; on a GPU alone

    @property
    def title(self) -> str:
        """The case in words."""
        labels = "soft labels" if self.soft else "class indices"
        return f"{self.case}  {'x'.join(map(str, self.shape))}  {self.dtype}  {labels}"

    def find(self, mode: str, provider: str) -> Timing | None:
        """The timing of a provider in a mode, where there is one."""
        wanted = (mode, provider)
        return next((t for t in self.timings if (t.mode, t.provider) == wanted), None)

    def speedup(self, timing: Timing, provider: str) -> str:
        """How many times faster than `provider` in the same mode."""
        other = self.find(timing.mode, provider)
        return f"{other.median / timing.median:.1f}x" if other else "-"


Environment = dict[str, str | int | float]


def environment(device: str) -> Environment:
    """What the figures depend on: the command, the machine, the versions."""
    env: Environment = {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "fused_xent instruction set": fused_xent.cpu_capability(),
        "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        "fused_xent": fused_xent.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return env | gpu_environment() if device == "cuda" else env


def cpu_name() -> str:
    """The processor's name as Linux knows it, elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summary(env: Environment) -> str:
    """The environment in one line."""
    versions = f"fused_xent {env['fused_xent']}, torch {env['torch']}, Python {env['python']}"
    if "gpu" in env:
        copy = f"a large copy moves {env['copy bytes a second'] / 1e9:.0f} GB/s"
        return f"{env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, {copy}; {versions}"
    return (
        f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores, "
        f"{env['fused_xent instruction set']}; {versions}"
    )


def terminal(result: Result) -> Iterator[str]:
    """Lines of one case's table."""
    yield result.title
    baselines = (f"{t.mode} {_rate(t)}" for t in result.timings if t.mode in ("copy", "read"))
    yield "  the logits alone: " + ", ".join(baselines)
    yield " " * 22 + "".join(map(str.rjust, COLUMNS, WIDTHS))
    for mode, title in MODE_TITLES.items():
        rows = [t for t in result.timings if t.mode == mode]
        if rows:
            yield f"  {title}"
        for timing in rows:
            cells = map(str.rjust, _cells(result, timing), WIDTHS)
            yield f"    {timing.provider:18}" + "".join(cells)
    if result.peak_bytes:
        peaks = (f"{name} {size / 1e6:.1f}" for name, size in result.peak_bytes.items())
        yield "  memory of a step beyond logits and target, MB: " + ", ".join(peaks)
    yield ""


def _rate(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f} ms ({timing.bandwidth / 1e9:.1f} GB/s)"


def _cells(result: Result, timing: Timing) -> tuple[str, ...]:
    copy, read = result.find("copy", "torch"), result.find("read", "torch")
    first, third = timing.quartiles
    return (
        f"{timing.median * 1e3:.2f}",
        f"{first * 1e3:.2f}-{third * 1e3:.2f}",
        f"{timing.bandwidth / 1e9:.1f}",
        f"{timing.bandwidth / copy.bandwidth:.0%}",
        f"{timing.bandwidth / read.bandwidth:.0%}",
        f"{timing.median / copy.median:.2f}",
        result.speedup(timing, "torch eager"),
        result.speedup(timing, "torch.compile"),
    )


def markdown(results: Iterable[Result], env: Environment) -> Iterator[str]:
    """Lines of the README's table: a row per case and mode, a column per provider."""
    results = list(results)
    names = dict.fromkeys(t.provider for r in results for t in r.timings if t.mode in MODE_TITLES)
    head = ["case", "mode", "one copy", *names]
    yield f"| {' | '.join(head)} |"
    yield "|---|---|" + "---:|" * (len(head) - 2)
    for result in results:
        for mode in MODE_TITLES:
            timings = [result.find(mode, name) for name in names]
            if any(timings):
                copy = f"{result.find('copy', 'torch').median * 1e3:.2f}"
                cells = [_markdown_cell(result, timing) for timing in timings]
                yield f"| {' | '.join([result.title, mode, copy, *cells])} |"
    yield ""
    yield (
        "Milliseconds, medians, all columns interleaved in one run; in brackets, times faster "
        f"than torch eager / torch.compile. {summary(env)}. `{env['command']}`"
    )


def _markdown_cell(result: Result, timing: Timing | None) -> str:
    if timing is None:
        return "-"
    cell = f"{timing.median * 1e3:.2f}"
    if timing.provider.startswith("torch"):
        return cell
    eager, compiled = (result.speedup(timing, f"torch{kind}") for kind in (" eager", ".compile"))
    return f"{cell} ({eager} / {compiled})"


def write_json(path: Path, results: Iterable[Result], env: Environment) -> None:
    """Writes the environment, and every sample of every timing."""
    content = {"environment": env, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


@dataclass
class Progress:
    """One line on stderr that says what is being done; silent where stderr is no terminal."""

    total: int
    done: int = 0
    title: str = ""

    def start(self, title: str) -> None:
        """Turns to the next of `total` pieces of work."""
        self.done, self.title = self.done + 1, title

    def show(self, doing: str) -> None:
        """Replaces the line."""
        self._write(f"[{self.done}/{self.total}] {self.title}: {doing}")

    def clear(self) -> None:
        """Takes the line away, before something else is printed."""
        self._write("")

    @staticmethod
    def _write(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
