"""Measures cross-entropy losses on this machine: `python -m bench --help`."""

from __future__ import annotations

import argparse
import sys

from . import linear, report
from .cases import DTYPES, MODES, SUITES, Case, bytes_moved
from .command import Parser, at_least
from .peers import PEERS, peers
from .providers import Check, Provider, providers
from .report import Progress, Result, Timing
from .timing import Workload, interleave

LIMITS = (10, 3.0)  # at least so many rounds and seconds a case
QUICK_LIMITS = (5, 1.0)


def parser() -> Parser:
    """The command line."""
    epilog = "python -m bench linear --help: the loss of a linear layer, without its logits"
    result = Parser(prog="python -m bench", description=__doc__, epilog=epilog)
    names = dict.fromkeys(name for suite in SUITES.values() for name in suite.cases)
    result.add_argument("case", nargs="*", help=f"any of {', '.join(names)}")
    result.add_argument("--rows", type=at_least(1), help="rows of a case of your own")
    result.add_argument("--vocab", type=at_least(2), help="classes of a case of your own")
    result.add_argument("--soft", action="store_true", help="soft labels in your own case")
    result.add_argument("--dtype", action="append", choices=DTYPES, help="may be given repeatedly")
    modes = (
        "may be given repeatedly; backward and both also measure inplace "
        "(inplace_backward=True), both also fused (grad_in_forward=True)"
    )
    result.add_argument("--mode", action="append", choices=MODES, help=modes)
    quick = "fewer rounds, and fewer cases unless named: a minute"
    result.add_argument("--quick", action="store_true", help=quick)
    result.add_common()
    return result


def chosen_cases(parser: Parser, options: argparse.Namespace) -> list[Case]:
    """The cases that the options name; ends the program where they name none."""
    suite = SUITES[options.device]
    for name in options.case:
        if name not in suite.cases:
            parser.error(f"case must be one of {', '.join(suite.cases)}, got {name!r}")
    cases = [suite.cases[name] for name in options.case]
    if (options.rows is None) != (options.vocab is None):
        parser.error("--rows and --vocab must be given together")
    if options.rows is not None:
        cases.append(Case("custom", (options.rows, options.vocab), options.soft))
    elif options.soft:
        parser.error("--soft must come with --rows and --vocab")
    return cases or [
        suite.cases[name] for name in (suite.quick if options.quick else suite.default)
    ]


def check(
    workload: Workload, candidates: list[Provider], modes: list[str], progress: Progress
) -> tuple[list[Provider], dict[str, dict[str, float]], dict[str, str]]:
    """The providers that tell the truth, the errors of each, and why others were left out."""
    passed, errors, failures = [], {}, {}
    progress.show("float64 reference")
    compare = Check(workload)
    for provider in candidates:
        if not set(modes) & set(provider.modes):
            continue
        if provider.indices_only and workload.target.is_floating_point():
            continue
        progress.show(f"checking {provider.name}")
        try:
            errors[provider.name] = compare(provider)
            passed.append(provider)
        except Exception as error:  # whatever one raises, the others are still measured
            failures[provider.name] = f"{type(error).__name__}: {error}"
    return passed, errors, failures


def measure(
    case: Case, dtype: str, options: argparse.Namespace, others: list[Provider], progress: Progress
) -> Result:
    """Checks every provider in one case, then times those that passed, in turn."""
    modes = options.mode or list(MODES)
    workload = Workload(*case.tensors(DTYPES[dtype], options.device))
    passed, errors, failures = check(workload, providers() + others, modes, progress)
    on_gpu = options.device == "cuda"
    peak_bytes = {p.name: workload.peak_bytes(p.loss) for p in passed} if on_gpu else {}
    timers = [workload.baselines]
    for provider in passed:
        timers += provider.timers(workload, modes)
    limits = QUICK_LIMITS if options.quick or on_gpu else LIMITS
    samples = interleave(timers, *limits, lambda n: progress.show(f"timing, round {n}"))
    fused = {provider.name for provider in passed if provider.fused}
    timings = []
    for (mode, name), seconds in samples.items():
        traffic = bytes_moved(workload.original, workload.target, mode, name in fused)
        timings.append(Timing(mode, name, traffic, seconds))
    return Result(case.name, case.shape, case.soft, dtype, timings, errors, failures, peak_bytes)


def main(arguments: list[str] | None = None) -> int:
    """Measures what the arguments name. Returns 1 where a provider was wrong, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["linear"]:
        return linear.main(arguments[1:])
    command = parser()
    options = command.parse_args(arguments)
    cases = chosen_cases(command, options)
    command.check_common(options)
    others, missing = peers(PEERS) if options.device == "cuda" else ([], {})
    for name, reason in missing.items():
        print(f"not measured: {name} ({reason})", file=sys.stderr)
    runs = [(case, dtype) for case in cases for dtype in options.dtype or case.dtypes]
    env = report.environment(options.device)
    if not options.markdown:
        print(report.summary(env), end="\n\n")
    progress, results = Progress(len(runs)), []
    for case, dtype in runs:
        progress.start(f"{case.name} {dtype}")
        results.append(measure(case, dtype, options, others, progress))
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
