"""Trains a small language model on Python's own library, with torch's loss and with fused_xent's.

All runs start from one seed and take turns, a step each, in processes of their own. This process
imports no torch: a child's peak memory would start from its parent's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from time import perf_counter

from .device import default_device, why_not

LOSSES = ("torch", "fused_xent", "fused_xent fused")
VOCAB_SIZE = 32768
MIN_VOCAB_SIZE = 32000
STEPS = 60
MAX_SECONDS = 90.0  # a slow machine trains for fewer steps
# Of the loss. On a GPU torch's own backward passes add up in changing orders.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}

TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def library_sources() -> list[str]:
    """The text of every module of the standard library, but for its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    paths = [path for path in paths if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    return [path.read_text("utf-8", errors="replace") for path in paths]


def encode(sources: list[str]) -> tuple[array, int]:
    """Tokens of all sources, and how many different ones there are.

    The vocabulary has every character and, in the room that is left, the most frequent words.
    Words that it lacks are spelled.
    """
    words: Counter[str] = Counter()
    for source in sources:
        words.update(TOKEN.findall(source))
    characters = sorted(set(chain.from_iterable(sources)))
    frequent = (word for word, _ in words.most_common(VOCAB_SIZE) if len(word) > 1)
    vocabulary = [*characters, *frequent][:VOCAB_SIZE]
    number = {word: i for i, word in enumerate(vocabulary)}
    tokens = array("i")
    for source in sources:
        for word in TOKEN.findall(source):
            if word in number:
                tokens.append(number[word])
            else:
                tokens.extend(number[character] for character in word)
    return tokens, len(set(tokens))


class Run:
    """A training process that takes a step when told to."""

    def __init__(self, loss: str, tokens_file: str, n_tokens: int, device: list[str]) -> None:
        """Starts the process, which reads `n_tokens` of int32 from `tokens_file`."""
        command = [sys.executable, "-m", "bench.demo_training", loss, tokens_file]
        command += [str(n_tokens), str(VOCAB_SIZE), *device]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.loss = loss
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        """Takes one training step."""
        with suppress(BrokenPipeError):  # of a process that failed: the lack of an answer says so
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        self.steps.append(self._answer())

    def finish(self) -> None:
        """Ends the process, which tells its `device`, the `place` and its `peak_bytes`."""
        self.process.stdin.close()
        self.summary = self._answer()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.demo: the run with {self.loss} ended early, see above")
        return json.loads(line)

    def column(self, key: str) -> list[float]:
        """One value of every step."""
        return [step[key] for step in self.steps]


def train(runs: list[Run]) -> Iterator[int]:
    """Lets all runs take their steps in turn; yields after each round."""
    start = perf_counter()
    for step in range(1, STEPS + 1):
        for run in runs:
            run.step()
        yield step
        if perf_counter() - start > MAX_SECONDS:
            return


def show_progress(text: str, step: int = 0) -> None:
    """A bar on stderr, where that is a terminal."""
    if sys.stderr.isatty():
        bar = ("#" * (30 * step // STEPS)).ljust(30, ".")
        print(f"\r\033[K[{bar}] {text}", end="", file=sys.stderr, flush=True)


def difference(run: Run, other: Run) -> float:
    """The largest difference between two loss curves; infinite where one is not a number."""
    pairs = zip(run.column("loss"), other.column("loss"), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def table(runs: list[Run]) -> Iterator[str]:
    """Lines that compare the runs with the first."""
    first = runs[0]
    yield row("", *(run.loss for run in runs))
    for step in sorted({0, len(first.steps) // 2, len(first.steps) - 1}):
        yield row(f"loss at step {step + 1}", *(f"{run.column('loss')[step]:.6f}" for run in runs))
    yield row("largest difference", "-", *(f"{difference(run, first):.1e}" for run in runs[1:]))
    for title, key in (("time in the loss", "loss_seconds"), ("time a step", "step_seconds")):
        medians = [statistics.median(run.column(key)) for run in runs]
        ratios = (f"{t * 1e3:.1f} ms ({medians[0] / t:.1f}x)" for t in medians)
        yield row(title, *ratios)
    yield row("peak memory", *(f"{run.summary['peak_bytes'] / 1e6:.0f} MB" for run in runs))


def row(title: str, *cells: str) -> str:
    """A line of the table."""
    return f"{title:20}" + "".join(f"{cell:>20}" for cell in cells)


def main() -> int:
    """Trains, prints the table, and returns the exit status: 1 where the curves disagree."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    help = "default: cuda where there is a GPU with kernels, else cpu"
    parser.add_argument("--device", choices=TOLERANCE, help=help)
    chosen = parser.parse_args().device
    device = ["--device", chosen] if chosen else []
    if why_not(chosen or default_device()):
        parser.error(why_not(chosen or default_device()))
    show_progress("reading Python's library")
    tokens, vocab_size = encode(library_sources())
    if vocab_size < MIN_VOCAB_SIZE:
        raise SystemExit(f"bench.demo: Python's library has only {vocab_size} different words here")
    with tempfile.NamedTemporaryFile() as file:
        tokens.tofile(file)
        file.flush()
        runs = [Run(loss, file.name, len(tokens), device) for loss in LOSSES]
        try:
            for step in train(runs):
                losses = ", ".join(f"{run.steps[-1]['loss']:.3f}" for run in runs)
                show_progress(f"step {step} of {STEPS}, loss {losses}", step)
            for run in runs:
                run.finish()
        finally:
            for run in runs:
                run.process.kill()  # where one failed; those that finished are gone already
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(
        f"{len(tokens):,} tokens of Python's own library, {vocab_size} different ones; "
        f"{len(runs[0].steps)} of {STEPS} float32 steps on {runs[0].summary['place']}, "
        "medians\n"
    )
    print(*table(runs), sep="\n")
    tolerance = TOLERANCE[runs[0].summary["device"]]
    agree = all(difference(run, runs[0]) <= tolerance for run in runs)
    print(f"\nThe loss curves {'agree' if agree else 'DISAGREE'} to {tolerance:.0e}.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
