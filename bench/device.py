"""The device that is measured: its choice, its clock, its memory, its names."""

from __future__ import annotations

import ctypes
import gc
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fused_xent

DEVICES = ("cpu", "cuda")
# Several times the last-level cache of a CPU, or the L2 cache of a GPU. On a GPU, this write also
# takes longer than the host needs to launch a small loss: the device does not wait for the host
# while it is timed.
FLUSHED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


def default_device() -> str:
    """The GPU if there is one and this package has kernels for it, else the CPU."""
    return "cpu" if why_not_cuda() else "cuda"


def why_not(device: str) -> str:
    """Why this package cannot be measured on a device; empty if it can."""
    if device == "cuda":
        return why_not_cuda()
    if fused_xent.cpu_capability() is None:  # torch operations would be measured
        return f"fused_xent in {Path(fused_xent.__file__).parent} has no kernels: see `make bench`"
    return ""


def why_not_cuda() -> str:
    """Why this package cannot be measured on a GPU; empty if it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if fused_xent.cpu_capability() is None or not has_kernel("fused_xent::forward", "CUDA"):
        return "there are no CUDA kernels: see python -m fused_xent"
    return ""


def free_bytes(device: str) -> int | None:
    """Returns the available memory; None if the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _allowed_bytes() if MEMINFO.exists() else None


def _allowed_bytes() -> int:
    """Returns the memory that Linux has available, or less if this process is limited."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    free = _kilobytes(MEMINFO, "MemAvailable")
    if limit == resource.RLIM_INFINITY:
        return free
    return min(free, max(0, limit - _kilobytes(PROCESS / "status", "VmData")))


@contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, allocating more memory than is available raises, before Linux kills the process."""
    if not MEMINFO.exists():
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kilobytes(PROCESS / "status", "VmData") + _allowed_bytes() * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Recognizes the errors of torch's GPU allocator, of Python, and of torch's CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class HostClock:
    """For the CPU, where a call has done its work when it returns."""

    @cached_property
    def _flushed(self) -> torch.Tensor:
        """The memory whose writing empties the caches."""
        return torch.empty(FLUSHED_BYTES["cpu"], dtype=torch.uint8)

    def start(self) -> float:
        """A mark from which to measure, with cold caches."""
        self._flushed.zero_()
        return perf_counter()

    def mark(self) -> float:
        """A mark."""
        return perf_counter()

    def seconds(self, first: float, last: float) -> float:
        """The time between two marks."""
        return last - first


class EventClock:
    """For a GPU. The host runs ahead of it, so marks are events in its stream."""

    @cached_property
    def _flushed(self) -> torch.Tensor:
        """The memory whose writing empties the caches."""
        return torch.empty(FLUSHED_BYTES["cuda"], dtype=torch.uint8, device="cuda")

    def start(self) -> torch.cuda.Event:
        """A mark from which to measure, with cold caches."""
        self._flushed.zero_()
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        """A mark."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Waits for the last mark; returns the time between both."""
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@cache
def clock(device: str) -> HostClock | EventClock:
    """The clock of a device type."""
    return HostClock() if device == "cpu" else EventClock()


class PeakMemory:
    """Peak memory inside a `with` block, beyond what was in use before it.

    On a GPU, as torch counts it. On the CPU, the resident memory of this process as Linux counts
    it, which includes the allocations of libraries; `bytes` is None on other systems.
    """

    def __init__(self, device: str = "cuda") -> None:
        """Measures on this device type."""
        self._is_cuda = device == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        """Starts the measurement."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif PEAK_RESET.exists():
            gc.collect()
            fused_xent.empty_cache()  # so that the memory of a gradient counts for its step
            ctypes.CDLL(None).malloc_trim(0)  # freed memory may stay resident until then
            PEAK_RESET.write_text("5")  # resets the peak to what is resident now
            self._before = _kilobytes(PROCESS / "status", "VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        """Sets `bytes`."""
        if self._is_cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif PEAK_RESET.exists():
            self.bytes = _kilobytes(PROCESS / "status", "VmHWM") - self._before


PROCESS, MEMINFO = Path("/proc/self"), Path("/proc/meminfo")
PEAK_RESET = PROCESS / "clear_refs"


def _kilobytes(file: Path, name: str) -> int:
    """Returns the bytes in the line `name: n kB` of a file."""
    lines = file.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy in GPU memory, far larger than any cache."""
    source = torch.randint(256, (1 << 31,), dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    timer = clock("cuda")
    seconds = []
    for _ in range(20):
        start = timer.start()
        copy.copy_(source)
        seconds.append(timer.seconds(start, timer.mark()))
    return 2 * source.nbytes / statistics.median(seconds)


def gpu_environment() -> dict[str, str | int | float]:
    """Describes the current GPU and the driver, and measures the bandwidth of a copy."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu memory bytes": properties.total_memory,
        "gpu L2 bytes": properties.L2_cache_size,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "copy bytes a second": copy_bandwidth(),
    }


def driver_version() -> str:
    """The version of NVIDIA's driver, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"
