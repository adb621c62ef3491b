"""Tries faults in several copies of the project at once."""

import queue
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from . import TABLES
from .tree import Outcome, Tree

Key = tuple[str, str]  # the name of a table, and of one of its faults
NATIVE = ("cpu", "binding")  # faults in fused_xent._C; those of CUDA are built for the emulator


class Runner:
    """Runs jobs in parallel, each in its own copy of the project."""

    def __init__(self, folder: Path, jobs: int, builds: Path) -> None:
        """Make a copy of the project in the folder for each job."""
        self.trees: queue.Queue[Tree] = queue.Queue()
        for i in range(jobs):
            self.trees.put(Tree(folder.resolve() / str(i), builds.resolve()))

    def unbroken(self, keys: list[Key]) -> str:
        """Run the tests of these faults on unchanged code; return the output if any fail."""
        tests = dict.fromkeys(test for table, name in keys for test in TABLES[table][name].tests)
        tree = self.trees.get()
        if any(table in NATIVE for table, _ in keys):
            tree.use_library()
        result = tree.run(tests, "-rf")
        tree.restore_library()
        self.trees.put(tree)
        return "" if result.returncode == 0 else result.stdout[-5000:]

    def run(self, keys: list[Key]) -> Iterator[tuple[Key, Outcome, float]]:
        """Try these faults; yield each outcome and its duration as soon as it is known."""
        with ThreadPoolExecutor(self.trees.qsize()) as pool:
            for job in as_completed([pool.submit(self._attempt, key) for key in keys]):
                yield job.result()

    def _attempt(self, key: Key) -> tuple[Key, Outcome, float]:
        table, name = key
        tree, start = self.trees.get(), time.monotonic()
        try:
            outcome = tree.attempt(TABLES[table][name], table in NATIVE)
        finally:
            self.trees.put(tree)
        return key, outcome, time.monotonic() - start

    @staticmethod
    def report(outcomes: Iterator[tuple[Key, Outcome, float]]) -> int:
        """Print each outcome and a summary; return the exit status."""
        verdicts: Counter[str] = Counter()
        for (table, name), outcome, seconds in outcomes:
            verdicts[outcome.verdict] += 1
            reason = TABLES[table][name].unseen
            print(f"{outcome.verdict:9} {seconds:6.1f} s  {table}: {name}", flush=True)
            if outcome.verdict == "unseen":
                print(f"{'':20} because {reason}", flush=True)
            elif outcome.verdict == "INVALID":
                print(outcome.output[-3000:], flush=True)
        print(f"{verdicts.total()} faults: " + ", ".join(f"{n} {v}" for v, n in verdicts.items()))
        return int(verdicts["SURVIVED"] + verdicts["INVALID"] > 0)
