"""Measures cross-entropy losses on this machine: `python -m bench --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NoReturn

from . import report
from .cases import CASES, DEFAULT, DEFAULT_DTYPES, DTYPES, MODES, QUICK, Case, bytes_moved
from .providers import Check, Provider, providers
from .report import Progress, Result, Timing
from .timing import Workload, interleave

LIMITS = (10, 3.0)  # at least so many rounds and seconds a case
QUICK_LIMITS = (5, 1.0)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(minimum: int) -> Callable[[str], int]:
    """A type of argument: integers from `minimum` on."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            message = f"must be an integer of at least {minimum}, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return convert


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="python -m bench", description=__doc__)
    result.add_argument("case", nargs="*", help=f"any of {', '.join(CASES)}")
    result.add_argument("--rows", type=at_least(1), help="rows of a case of your own")
    result.add_argument("--vocab", type=at_least(2), help="classes of a case of your own")
    result.add_argument("--soft", action="store_true", help="soft labels in your own case")
    result.add_argument("--dtype", action="append", choices=DTYPES, help="may be given repeatedly")
    modes = (
        "may be given repeatedly; backward and both also measure inplace "
        "(inplace_backward=True), both also fused (grad_in_forward=True)"
    )
    result.add_argument("--mode", action="append", choices=MODES, help=modes)
    result.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    result.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    result.add_argument("--markdown", action="store_true", help="print a table for a README")
    return result


def chosen_cases(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """The cases that the options name; ends the program where they name none."""
    for name in options.case:
        if name not in CASES:
            parser.error(f"case must be one of {', '.join(CASES)}, got {name!r}")
    cases = [CASES[name] for name in options.case]
    if (options.rows is None) != (options.vocab is None):
        parser.error("--rows and --vocab must be given together")
    if options.rows is not None:
        cases.append(Case("custom", (options.rows, options.vocab), options.soft))
    elif options.soft:
        parser.error("--soft must come with --rows and --vocab")
    return cases or [CASES[name] for name in (QUICK if options.quick else DEFAULT)]


def check(
    workload: Workload, modes: list[str], progress: Progress
) -> tuple[list[Provider], dict[str, dict[str, float]], dict[str, str]]:
    """The providers that tell the truth, the errors of each, and why others were left out."""
    passed, errors, failures = [], {}, {}
    progress.show("float64 reference")
    compare = Check(workload)
    for provider in providers():
        if not set(modes) & set(provider.modes):
            continue
        progress.show(f"checking {provider.name}")
        try:
            errors[provider.name] = compare(provider)
            passed.append(provider)
        except Exception as error:  # whatever one raises, the others are still measured
            failures[provider.name] = f"{type(error).__name__}: {error}"
    return passed, errors, failures


def measure(case: Case, dtype: str, modes: list[str], quick: bool, progress: Progress) -> Result:
    """Checks every provider in one case, then times those that passed, in turn."""
    workload = Workload(*case.tensors(DTYPES[dtype]))
    passed, errors, failures = check(workload, modes, progress)
    timers = [workload.baselines]
    for provider in passed:
        timers += provider.timers(workload, modes)
    limits = QUICK_LIMITS if quick else LIMITS
    samples = interleave(timers, *limits, lambda n: progress.show(f"timing, round {n}"))
    fused = {provider.name for provider in passed if provider.fused}
    timings = []
    for (mode, name), seconds in samples.items():
        traffic = bytes_moved(workload.original, workload.target, mode, name in fused)
        timings.append(Timing(mode, name, traffic, seconds))
    return Result(case.name, case.shape, case.soft, dtype, timings, errors, failures)


def main(arguments: list[str] | None = None) -> int:
    """Measures what the arguments name. Returns 1 where a provider was wrong, else 0."""
    command = parser()
    options = command.parse_args(arguments)
    cases = chosen_cases(command, options)
    if options.json and not options.json.parent.is_dir():
        command.error(f"--json must be in an existing folder, got {options.json}")
    dtypes, modes = options.dtype or DEFAULT_DTYPES, options.mode or list(MODES)
    env = report.environment()
    if not options.markdown:
        print(report.summary(env), end="\n\n")
    progress, results = Progress(len(cases) * len(dtypes)), []
    for case, dtype in product(cases, dtypes):
        progress.start(f"{case.name} {dtype}")
        results.append(measure(case, dtype, modes, options.quick, progress))
        progress.clear()
        if not options.markdown:
            print(*report.terminal(results[-1]), sep="\n", flush=True)
        for provider, reason in results[-1].failures.items():
            print(f"FAILED {results[-1].title}: {provider}: {reason}", file=sys.stderr)
    if options.markdown:
        print(*report.markdown(results, env), sep="\n")
    if options.json:
        report.write_json(options.json, results, env)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
