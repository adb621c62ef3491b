"""Runs a function of a test module in several processes, which form a group of torch.distributed.

The processes use gloo on the CPU, or NCCL on GPUs. If one of them fails, or if they take too long,
all are stopped and the error names the process. A function of a module ``test_x`` is run by
``run(function, n_processes)``; it can ask ``torch.distributed`` for its rank. One new process
imports torch and the module, which takes seconds, and forks the others.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent


def run(function, n_processes, *arguments, timeout=240, backend="gloo"):
    """Run function(*arguments) in each process; arguments are strings."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    # Otherwise a question for a GPU at import would use CUDA, which forked processes cannot.
    env = {**os.environ, "PYTHONPATH": path, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, "-W", "ignore", __file__, function.__module__, function.__name__]
    command += [backend, str(n_processes), str(timeout), *arguments]
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **to) as first:
        try:
            output, _ = first.communicate()
        finally:  # a time limit of pytest ends the test: the forked processes must not go on
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 0, output


def _main(module, function, backend, n_processes, timeout, *arguments):
    test = getattr(importlib.import_module(module), function)
    end = time.monotonic() + float(timeout)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"log{rank}" for rank in range(int(n_processes))]
        ranks = [_fork(test, arguments, backend, logs, rank) for rank in range(len(logs))]
        failure = _wait(ranks, logs, end)
        print(failure or "", end="", flush=True)
    return int(failure is not None)


def _fork(test, arguments, backend, logs, rank):
    """Start the process of a rank; return its number."""
    process = os.fork()
    if process != 0:
        return process
    status = 1
    try:
        with logs[rank].open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        torch.set_num_threads(1)
        torch.manual_seed(0)  # the same numbers in each process
        dist.init_process_group(
            backend,
            init_method=f"file://{logs[0].parent}/store",
            rank=rank,
            world_size=len(logs),
            timeout=timedelta(seconds=120),
        )
        test(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a torch thread that waits for the GIL at exit would abort the process


def _wait(processes, logs, end):
    """Wait until all have ended or some have failed; stop the others. Return what failed, or None.

    Where one dies, others fail soon after, because their connection breaks.
    """
    running, failed = dict(enumerate(processes)), []
    while running and not failed and time.monotonic() < end:
        for rank, process in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del running[rank]
                failed += [rank] if status != 0 else []
        time.sleep(0.05)
    for process in running.values():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    what, ranks = ("failed", failed) if failed else ("has not ended in time", running)
    reports = [f"process {rank} {what}:\n{logs[rank].read_text()[-6000:]}" for rank in ranks]
    return "\n".join(reports) or None


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
