"""Runs a function of a test module in several processes, which form a group of torch.distributed.

The processes use gloo on the CPU, or NCCL on GPUs. If one of them fails, or if they take too long,
all are stopped and the error names the process. A function of a module ``test_x`` is run by
``run(function, n_processes)``; it can ask ``torch.distributed`` for its rank.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent


def run(function, n_processes, *arguments, timeout=240, backend="gloo"):
    """Run function(*arguments) in each process; arguments are strings."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-W", "ignore", __file__, function.__module__, function.__name__]
        logs = [Path(folder) / f"log{rank}" for rank in range(n_processes)]
        processes = []
        for rank, log in enumerate(logs):
            store = str(Path(folder) / "store")
            of_rank = [backend, str(rank), str(n_processes), store, *arguments]
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        command + of_rank,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "PYTHONPATH": path},
                    )
                )
        try:
            _wait(processes, logs, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes, logs, end):
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > end:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll():
            raise AssertionError(f"process {rank} failed:\n{logs[rank].read_text()[-6000:]}")
    for rank, process in enumerate(processes):
        if process.poll() is None:
            text = logs[rank].read_text()[-2000:]
            raise AssertionError(f"process {rank} has not ended in time:\n{text}")


def _main(module, function, backend, rank, n_processes, store, *arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same numbers in each process
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(n_processes),
        timeout=timedelta(seconds=120),
    )
    getattr(importlib.import_module(module), function)(*arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
    os._exit(0)  # a torch thread that waits for the GIL at exit would abort the process
