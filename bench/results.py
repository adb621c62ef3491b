"""The results of a run, and their files: JSON with every sample, and CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fused_xent

from .cases import DTYPES, MODES
from .device import gpu_environment

EAGER = "torch eager"  # every provider is compared with it
BENCHMARKS = ("loss", "linear", "overhead")
LABELS = {
    "indices": "",
    "soft": "soft labels",
    "sparse": "sparse labels",
    "selected": "selected classes",
}
BASELINES = ("copy", "read")  # modes that measure the bandwidth of memory
HOST_MODES = ("host forward", "host both")  # time of the host, which runs ahead of a GPU
Environment = dict[str, "str | int | float"]


@dataclass
class Timing:
    """The samples of one provider in one mode of a case, or of a baseline."""

    mode: str
    provider: str
    bytes: int  # that the algorithm must move
    operations: int  # that it must compute
    peak_bytes: int | None = None  # peak beyond inputs; None if unknown
    seconds: list[float] = field(default_factory=list)
    kernels: int | None = None  # launched per call; None if not counted

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds; of fewer than 4 samples, minimum and maximum."""
        if len(self.seconds) < 4:
            return min(self.seconds), max(self.seconds)
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def noise(self) -> float:
        """Interquartile range, relative to the median."""
        first, third = self.quartiles
        return (third - first) / self.median

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes / self.median

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.median

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes


@dataclass
class Result:
    """One case in one dtype; all timings come from one interleaved run."""

    benchmark: str  # one of BENCHMARKS
    case: str
    shape: tuple[int, ...]  # (N, C, ...) of logits; rows, features and classes of a linear layer
    dtype: str
    labels: str = "indices"  # one of LABELS, which says how a title names it
    options: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by provider, relative
    failures: dict[str, str] = field(default_factory=dict)  # by provider: what was wrong
    absent: dict[str, str] = field(default_factory=dict)  # by provider: why it was not measured

    @property
    def key(self) -> tuple:
        """Identifies what was measured: results with equal keys can be compared."""
        options = tuple(sorted(self.options.items()))
        return self.benchmark, self.case, tuple(self.shape), self.dtype, self.labels, options

    @property
    def title(self) -> str:
        """Case, shape, dtype and options, in one line."""
        parts = [self.case, "x".join(map(str, self.shape)), self.dtype]
        parts += [LABELS[self.labels]] if LABELS[self.labels] else []
        parts += [f"{name} {value:g}" for name, value in self.options.items()]
        return "  ".join(parts)

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return self.shape[2] if self.benchmark == "linear" else self.shape[1]

    def find(self, mode: str, provider: str) -> Timing | None:
        """The timing of a provider in a mode; None if there is none."""
        wanted = (mode, provider)
        return next((t for t in self.timings if (t.mode, t.provider) == wanted), None)

    def ratio(self, timing: Timing, provider: str) -> float | None:
        """Speedup over `provider` in the same mode; None if that was not measured."""
        other = self.find(timing.mode, provider)
        return other.median / timing.median if other else None

    def share(self, timing: Timing, baseline: str) -> float | None:
        """Bandwidth as a share of a baseline's; None if that was not measured."""
        other = self.find(baseline, "torch")
        return timing.bandwidth / other.bandwidth if other and timing.bytes else None


@dataclass
class Run:
    """All results of one command."""

    environment: Environment
    results: list[Result] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The machine and the versions, in one line."""
        env = self.environment
        versions = f"fused_xent {env['fused_xent']}, torch {env['torch']}, Python {env['python']}"
        if "gpu" in env:
            copy = f"a large copy moves {env['copy bytes a second'] / 1e9:.0f} GB/s"
            return f"{env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, {copy}; {versions}"
        return (
            f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores, "
            f"{env['fused_xent instruction set']}; {versions}"
        )

    def write_json(self, path: Path) -> None:
        """Writes everything, with every sample."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read_json(cls, path: Path) -> Run:
        """Reads a file that `write_json` wrote.

        Raises:
            ValueError: there is no such file, or it has another content.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        try:
            content = json.loads(path.read_text())
            run = cls(content["environment"], [_result(one) for one in content["results"]])
            _expect(run.environment, dict, None, "environment")
            _expect(list(run.environment), list, str, "environment")
            _expect(list(run.environment.values()), list, (str, int, float), "environment")
            _ = run.summary
            return run
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not from python -m bench --json ({reason})") from error

    def write_csv(self, path: Path) -> None:
        """Writes a line for each timing."""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(self.csv_rows())

    def csv_rows(self) -> Iterator[tuple]:
        """Yields the header, and a row for each timing; a value that is not known is empty."""
        yield (
            *("benchmark", "case", "shape", "dtype", "labels", "options", "mode", "provider"),
            *("samples", "median_s", "first_quartile_s", "third_quartile_s", "bytes"),
            *("bytes_per_s", "share_of_copy", "operations", "times_faster_than_eager"),
            *("peak_bytes", "largest_error", "kernels"),
        )
        for result in self.results:
            shape = "x".join(map(str, result.shape))
            options = " ".join(f"{name}={value:g}" for name, value in result.options.items())
            for t in result.timings:
                errors = result.errors.get(t.provider, {})
                yield (
                    *(result.benchmark, result.case, shape, result.dtype, result.labels, options),
                    *(t.mode, t.provider, len(t.seconds), t.median, *t.quartiles, t.bytes),
                    *(t.bandwidth, result.share(t, "copy"), t.operations),
                    *(result.ratio(t, EAGER), t.peak_bytes),
                    max(errors.values()) if errors else None,
                    t.kernels,
                )


def _result(content: dict) -> Result:
    """Makes a result of its JSON form.

    Raises:
        ValueError, TypeError: the form is not the one that `Run.write_json` writes.
    """
    result = Result(**{**content, "timings": [Timing(**one) for one in content["timings"]]})
    _expect(result.shape, list, int, "shape")
    result.shape = tuple(result.shape)
    _expect(result.benchmark, str, None, "benchmark", BENCHMARKS)
    _expect(result.case, str, None, "case")
    _expect(result.dtype, str, None, "dtype", DTYPES)
    _expect(result.labels, str, None, "labels", LABELS)
    for name in ("options", "errors", "failures", "absent"):
        kind = {"options": (int, float), "errors": dict}.get(name, str)
        _expect(getattr(result, name), dict, None, name)
        _expect(list(getattr(result, name).values()), list, kind, name)
        _expect(list(getattr(result, name)), list, str, name)
    if len(result.shape) < (3 if result.benchmark == "linear" else 2):
        raise ValueError(f"shape must have more dimensions, got {result.shape}")
    for timing in result.timings:
        _expect(timing.mode, str, None, "mode", (*BASELINES, *MODES, "step", *HOST_MODES))
        _expect(timing.provider, str, None, "provider")
        counts = timing.bytes, timing.operations, timing.peak_bytes or 0, timing.kernels or 0
        _expect(list(counts), list, int, "bytes")
        _expect(timing.seconds, list, (int, float), "seconds")
        if not timing.seconds or not all(1e-12 < one < 1e12 for one in timing.seconds):
            raise ValueError("seconds must be one or more positive numbers")
        if timing.bytes < 0 or timing.operations < 0:
            raise ValueError("bytes and operations must not be negative")
        json.dumps([timing.provider, result.case], ensure_ascii=False).encode()
    return result


def _expect(value, kind, of, name: str, known: Collection[str] | None = None) -> None:
    """Raises TypeError or ValueError if a value, or an element of it, does not fit."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r:.50}")
    for one in value if of else ():
        if not isinstance(one, of) or isinstance(one, bool):
            raise TypeError(f"{name} must have elements of {of}, got {one!r:.50}")
    if known is not None and value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.50}")


def environment(device: str) -> Environment:
    """Describes what the results depend on: the command, the machine, the versions."""
    env: Environment = {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "fused_xent instruction set": fused_xent.cpu_capability() or "none",
        "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        "fused_xent": fused_xent.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return env | gpu_environment() if device == "cuda" else env


def cpu_name() -> str:
    """Returns the processor's name from /proc/cpuinfo or, if there is none, from Python."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
