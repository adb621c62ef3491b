"""The device that is measured: which one, its clock, its memory, its names."""

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
# Several times the last cache of a CPU, and the second-level cache of any GPU: there, to write so
# much takes longer than the host takes to launch a small loss, so that the device does not wait for
# the host while it is timed.
FLUSHED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


def default_device() -> str:
    """The GPU where there is one with kernels, else the CPU."""
    return "cpu" if why_not_cuda() else "cuda"


def why_not(device: str) -> str:
    """Why this package cannot be measured on a device; empty where it can."""
    if device == "cuda":
        return why_not_cuda()
    if fused_xent.cpu_capability() is None:  # torch's own operations would be measured
        return f"fused_xent in {Path(fused_xent.__file__).parent} has no kernels: see `make bench`"
    return ""


def why_not_cuda() -> str:
    """Why a GPU cannot be measured; empty where it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if fused_xent.cpu_capability() is None or not has_kernel("fused_xent::forward", "CUDA"):
        return "there are no CUDA kernels: see python -m fused_xent"
    return ""


def free_bytes(device: str) -> int | None:
    """Memory that can be had; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _allowed_bytes() if MEMINFO.exists() else None


def _allowed_bytes() -> int:
    """What Linux has, or as much of it as this process may take."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    free = _kilobytes(MEMINFO, "MemAvailable")
    if limit == resource.RLIM_INFINITY:
        return free
    return min(free, max(0, limit - _kilobytes(PROCESS / "status", "VmData")))


@contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, this process fails to allocate what the machine has not, instead of being killed."""
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
    """As the GPU's allocator, Python's and torch's own say it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class HostClock:
    """For the CPU, where what was called has been done when it returns."""

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
    """For a GPU, which works while the host runs ahead: marks are events in its queue."""

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
        """The time between two marks. Waits for the last."""
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@cache
def clock(device: str) -> HostClock | EventClock:
    """The clock of a kind of device."""
    return HostClock() if device == "cpu" else EventClock()


class PeakMemory:
    """How much more memory was taken at once inside a `with` than before it.

    Of a GPU, by torch's count. Of this process otherwise, by Linux's count of what is resident, so
    that what libraries take for themselves is in it; elsewhere `bytes` is None.
    """

    def __init__(self, device: str = "cuda") -> None:
        """Of a kind of device."""
        self._is_cuda = device == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        """Starts to look."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif PEAK_RESET.exists():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what has been freed is resident until then
            PEAK_RESET.write_text("5")  # the peak is what is resident now
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
    """Bytes in a line `name: n kB`."""
    lines = file.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory that no cache holds."""
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
    """What figures of the current GPU depend on, and the bandwidth of a copy on it."""
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
    """NVIDIA's number of the driver, as nvidia-smi gives it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"
