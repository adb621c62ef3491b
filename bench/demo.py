"""Trains a small language model on Python's standard library, with torch's loss and fused_xent's.

All runs start from the same seed and take turns, one step each. Each run has its own process, so
that its peak memory can be measured.
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
# Of the loss. On a GPU the order of sums in torch's own backward passes varies.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}

TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def library_sources() -> list[str]:
    """Returns the text of every module of the standard library, except its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    paths = [path for path in paths if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    return [path.read_text("utf-8", errors="replace") for path in paths]


def encode(sources: list[str]) -> tuple[array, int]:
    """Returns the tokens of all sources, and the number of distinct ones.

    The vocabulary has every character, then the most frequent words up to `VOCAB_SIZE`. Other
    words are spelled character by character.
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
        with suppress(BrokenPipeError):  # the process has failed: `_answer` reports it
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        self.steps.append(self._answer())

    def finish(self) -> None:
        """Ends the process; `summary` has its `device`, its `place` and its `peak_bytes`."""
        self.process.stdin.close()
        self.summary = self._answer()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.demo: the run with {self.loss} ended early, see above")
        return json.loads(line)

    def column(self, key: str) -> list[float]:
        """Returns one value of every step."""
        return [step[key] for step in self.steps]


def train(runs: list[Run]) -> Iterator[int]:
    """Trains all runs, one step each in turn; yields the step after each round."""
    start = perf_counter()
    for step in range(1, STEPS + 1):
        for run in runs:
            run.step()
        yield step
        if perf_counter() - start > MAX_SECONDS:
            return


def show_progress(text: str, step: int = 0) -> None:
    """Shows a progress bar on stderr, if that is a terminal."""
    if sys.stderr.isatty():
        bar = ("#" * (30 * step // STEPS)).ljust(30, ".")
        print(f"\r\033[K[{bar}] {text}", end="", file=sys.stderr, flush=True)


def difference(run: Run, other: Run) -> float:
    """The largest difference between two loss curves; infinity if one has NaN or infinity."""
    pairs = zip(run.column("loss"), other.column("loss"), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def table(runs: list[Run]) -> Iterator[str]:
    """Yields lines that compare the runs with the first."""
    first = runs[0]
    yield row("", *(run.loss for run in runs))
    for step in sorted({0, len(first.steps) // 2, len(first.steps) - 1}):
        yield row(f"loss at step {step + 1}", *(f"{run.column('loss')[step]:.6f}" for run in runs))
    yield row("largest difference", "-", *(f"{difference(run, first):.1e}" for run in runs[1:]))
    for title, key in (("time in the loss", "loss_seconds"), ("time per step", "step_seconds")):
        medians = [statistics.median(run.column(key)) for run in runs]
        ratios = (f"{t * 1e3:.1f} ms ({medians[0] / t:.1f}x)" for t in medians)
        yield row(title, *ratios)
    yield row("peak memory", *(f"{run.summary['peak_bytes'] / 1e6:.0f} MB" for run in runs))


def row(title: str, *cells: str) -> str:
    """Formats a line of the table."""
    return f"{title:20}" + "".join(f"{cell:>20}" for cell in cells)


def main() -> int:
    """Trains, prints the table, and returns the exit status: 1 if the curves disagree."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    help = "default: cuda if there is a GPU and kernels for it, else cpu"
    parser.add_argument("--device", choices=TOLERANCE, help=help)
    chosen = parser.parse_args().device
    device = ["--device", chosen] if chosen else []
    if why_not(chosen or default_device()):
        parser.error(why_not(chosen or default_device()))
    show_progress("reading Python's standard library")
    tokens, vocab_size = encode(library_sources())
    if vocab_size < MIN_VOCAB_SIZE:
        raise SystemExit(f"bench.demo: Python's library has only {vocab_size} distinct tokens here")
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
                run.process.kill()  # after a failure; finished runs have ended
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(
        f"{len(tokens):,} tokens of Python's standard library, {vocab_size} distinct; "
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
