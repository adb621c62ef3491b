"""What the commands share: their options, and the loop over the cases that they measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import tables
from .cases import DTYPES
from .device import (
    DEVICES,
    default_device,
    free_bytes,
    is_out_of_memory,
    limited_memory,
    why_not,
)
from .results import Result, Run, environment

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_common(self, providers: list[str]) -> None:
        """Adds the options of every command that measures."""
        device = f"default here: {default_device()}"
        self.add_argument("--device", choices=DEVICES, default=default_device(), help=device)
        self.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
        one = f"only this one; may be repeated: {', '.join(providers)}"
        self.add_argument(
            "--provider", action="append", choices=providers, metavar="NAME", help=one
        )
        self.add_argument("--rounds", type=at_least(1), help="samples of each timing")
        self.add_argument("--quick", action="store_true", help="fewer cases and rounds")
        self.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
        self.add_argument("--csv", type=Path, metavar="FILE", help="write one line per timing")
        self.add_argument("--markdown", action="store_true", help="print tables in Markdown")

    def check_common(self, options: argparse.Namespace) -> None:
        """Ends the program if nothing can be measured or written."""
        for name in ("json", "csv"):
            if path := getattr(options, name):
                self.check_writable(f"--{name}", path)
        if options.json and options.csv and options.json.resolve() == options.csv.resolve():
            self.error(f"--json and --csv must be two files, got {options.json} for both")
        if reason := why_not(options.device):
            self.error(f"--device {options.device} has nothing to measure: {reason}")

    def check_writable(self, option: str, path: Path) -> None:
        """Ends the program if a file cannot be written; does not leave a new file behind."""
        try:
            was_there = path.exists()
            path.open("ab").close()
            if not was_there:
                path.unlink()
        except (OSError, ValueError) as error:
            self.error(f"{option} must be a file that can be written: {error}")


def names_of(by_device: dict[str, Iterable[str]]) -> str:
    """Lists the cases of each device type, for a help text."""
    names = (f"{', '.join(names)} (--device {device})" for device, names in by_device.items())
    return f"one of {'; '.join(names)}"


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns a type of argument: integers from `minimum` up."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            message = f"must be an integer of at least {minimum}, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return convert


def between(least: float, most: float) -> Callable[[str], float]:
    """Returns a type of argument: numbers from `least` to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            message = f"must be a number from {least:g} to {most:g}, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return convert


@dataclass
class Job:
    """One case in one dtype."""

    result: Result  # is filled by `measure`
    bytes_needed: int  # memory that the measurement needs
    measure: Callable[[Result, Callable[[str], None]], None]  # the second argument shows progress


def measure_all(command: Parser, options: argparse.Namespace, jobs: list[Job]) -> tuple[Run, int]:
    """Measures, prints and writes all jobs. Returns the run and the exit status.

    The status is 1 if a provider was wrong, 2 if a case did not fit memory, and 130 after Ctrl-C,
    which still prints and writes what has been measured by then.
    """
    command.check_common(options)
    free = free_bytes(options.device)
    for job in jobs:
        if free is not None and job.bytes_needed > free:
            command.error(
                f"{job.result.title} must fit memory: it needs {job.bytes_needed / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free"
            )
    run, status = Run(environment(options.device)), 0
    limited = limited_memory if options.device == "cpu" else nullcontext
    out = tables.Output()
    if not options.markdown:
        out.print(run.summary, style="bold")
    for i, job in enumerate(jobs):
        try:
            with limited(), _progress() as progress:
                task = progress.add_task(job.result.title, total=len(jobs), completed=i, doing="")
                job.measure(job.result, lambda doing, task=task: progress.update(task, doing=doing))
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"{command.prog}: error: {job.result.title} must fit memory", file=sys.stderr)
            status = 2
            continue
        if job.result.timings or job.result.failures or status != INTERRUPTED:
            run.results.append(job.result)
            if not options.markdown:
                tables.show(job.result, out)
            for provider, reason in job.result.failures.items():
                print(f"FAILED {job.result.title}: {provider}: {reason}", file=sys.stderr)
                status = status or 1
            _write(command, options, run)  # after each job: the next may take minutes
        if status == INTERRUPTED:
            print("interrupted: these results are partial", file=sys.stderr)
            break
    if options.markdown:
        print(*tables.markdown(run.results), sep="\n")
        print(f"\n{run.summary}. `{run.environment['command']}`")
    elif run.results:
        out.print("", *tables.notes(run.results), sep="\n", style="dim")
    return run, status


def _write(command: Parser, options: argparse.Namespace, run: Run) -> None:
    """Writes the files that the options name; ends the program if that fails."""
    try:
        if options.json:
            run.write_json(options.json)
        if options.csv:
            run.write_csv(options.csv)
    except OSError as error:
        command.error(str(error))


def _progress() -> Progress:
    """Makes a progress line on stderr, if that is a terminal; it is erased before output."""
    stderr = Console(stderr=True)
    columns = (
        BarColumn(16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}: {task.fields[doing]}", markup=False),
    )
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
