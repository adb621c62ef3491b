"""``python -m fuzz``: distributes random calls over processes, and reports those that fail."""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import processes

from . import worker
from .calls import n_ranks

BATCH = {1: 2000, 2: 250, 3: 100}  # calls of one process, or group of processes
LONGEST = 1800  # seconds for a batch, also on a busy machine: beyond that, a call must hang
MOST_TEXTS = 100  # failures reported in full
GRACE = 120  # seconds for the last call, after the end


class Failure(NamedTuple):
    """A call that failed, and how."""

    number: int
    text: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="of all calls; default: another one each time")
    parser.add_argument("--calls", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--call", type=int, metavar="NUMBER", help="only this one, in full")
    parser.add_argument("--minutes", type=float, default=60, help="stop after (default: 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="batches at a time")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    return options


def batches(calls: int) -> Iterator[list[int]]:
    """Return the numbers of all calls, in lists of calls for equally many processes."""
    waiting: dict[int, list[int]] = {ranks: [] for ranks in BATCH}
    for number in range(calls):
        batch = waiting[n_ranks(number)]
        batch.append(number)
        if len(batch) == BATCH[n_ranks(number)]:
            yield batch[:]
            batch.clear()
    yield from filter(None, waiting.values())


def run_batch(seed: int, numbers: list[int], end: float) -> tuple[int, list[Failure]]:
    """Run calls in processes; return how many ran, and the failures.

    A call that ends its process, or that does not end itself, is one failure; the calls after it
    run in new processes, unless none was reached.
    """
    n_done, failures = 0, []
    while numbers and time.time() < end:
        died = None
        with tempfile.TemporaryDirectory() as folder:
            arguments = (folder, str(seed), json.dumps(numbers), str(end))
            ranks = n_ranks(numbers[0])
            try:
                longest = min(LONGEST, max(end - time.time(), 0) + GRACE)
                processes.run(worker.check_numbers, ranks, *arguments, timeout=longest)
            except AssertionError as error:
                died = str(error)
            noted = [_read(path) for path in Path(folder).iterdir()]
        begun = [line["number"] for lines in noted for line in lines if "number" in line]
        failed = {
            line["failed"]: line["text"] for lines in noted for line in lines if "failed" in line
        }
        failures += [Failure(*one) for one in failed.items()]
        n_done += len(set(begun))
        if died is None:
            break
        last = max(begun, default=numbers[0])
        failures.append(Failure(last, f"the process ended, or the call did not: {died[-3000:]}"))
        numbers = [number for number in numbers if number > last and begun]
    return n_done, failures


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(seed: int, number: int, text: str) -> None:
    """Print a failure and the command that repeats it."""
    print(f"\nFAILED call {number}: {text}")
    print(f'  to repeat: make fuzz ARGS="--seed {seed} --call {number}"', flush=True)


def main() -> int:
    """Return the exit status: 1 if a call failed."""
    options = parse()
    start, end = time.time(), time.time() + 60 * options.minutes
    print(f"seed {options.seed}", flush=True)
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in conftest.py
    work = batches(options.calls) if options.call is None else iter([[options.call]])
    n_done = n_failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for done, failures in pool.map(lambda batch: run_batch(options.seed, batch, end), work):
            n_done += done
            n_failed += len(failures)
            for number, text in failures:
                report(options.seed, number, text if n_failed <= MOST_TEXTS else "...")
    minutes = (time.time() - start) / 60
    print(f"{n_done - n_failed} passed, {n_failed} failed, in {minutes:.1f} minutes")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
