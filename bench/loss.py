"""Measures the loss of logits, its gradient, and both, for torch and other implementations too.

Each provider's results are compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import prod

from .cases import (
    DTYPES,
    MODES,
    SUITES,
    SWEPT_VOCABS,
    Case,
    Options,
    bytes_moved,
    operations,
    sweep,
)
from .check import CHUNK, Check, WrongResult
from .command import Job, Parser, at_least, between, measure_all, names_of
from .device import is_out_of_memory
from .providers import ADAPTERS, Adapters, Provider, Request, gather
from .results import BASELINES, Result, Timing
from .timing import Key, Workload, interleave

LIMITS = (10, 3.0)  # minimum of rounds and of seconds per case
QUICK_LIMITS = (5, 1.0)
QUICK_VOCABS = (1000, 32000, 128256)
# Bytes per logit that the loss and check() need beyond the logits, their original and a gradient:
# torch's float32 temporaries; and, for the logits of one chunk, the logits, two gradients, their
# squares and temporaries in float64.
FLOAT32, FLOAT64 = 4, 8 * 8


def add_options(command: Parser, modes: str) -> None:
    """Adds the options of both commands of this module."""
    command.add_argument("--mode", action="append", choices=MODES, help=modes)
    command.add_argument("--soft", action="store_true", help="soft labels instead of indices")
    share = between(0, 1)
    command.add_argument(
        "--label-smoothing", type=share, default=0.0, metavar="X", help="from 0 to 1"
    )
    ignored = "share of the rows that are ignored"
    command.add_argument(
        "--ignored", type=between(0, 0.999), default=0.0, metavar="X", help=ignored
    )
    penalty = "weight of the squared log-sum-exp, the z-loss"
    command.add_argument(
        "--lse-square-scale", type=between(0, 1), default=0.0, metavar="X", help=penalty
    )
    softcap = "logits become X tanh(logits / X)"
    command.add_argument("--softcap", type=between(1, 1000), default=0.0, metavar="X", help=softcap)
    command.add_common(list(ADAPTERS))


def wanted_options(command: Parser, options: argparse.Namespace, soft: bool) -> Options:
    """Returns the options of the loss; ends the program if they exclude each other."""
    if soft and options.ignored:
        command.error("--ignored must come with class indices, got soft labels")
    return Options(
        options.label_smoothing, options.ignored, options.lse_square_scale, options.softcap
    )


def job(case: Case, dtype: str, options: argparse.Namespace) -> Job:
    """Makes the job that measures a case in a dtype."""
    labels = "soft" if case.soft else "indices"
    result = Result("loss", case.name, case.shape, dtype, labels, case.options.wanted)
    n_logits, size = prod(case.shape), DTYPES[dtype].itemsize
    copies = 3 * size + FLOAT32 + (2 * size + FLOAT32) * case.soft
    needed = n_logits * copies + min(n_logits, CHUNK) * FLOAT64
    return Job(result, needed, partial(measure, case, options))


def measure(
    case: Case,
    options: argparse.Namespace,
    result: Result,
    show: Callable[[str], None],
    adapters: Adapters | None = None,
) -> None:
    """Checks every provider in one case, then times those that passed, in turn."""
    modes = list(dict.fromkeys(options.mode or MODES))
    show("making inputs")
    workload = Workload(*case.tensors(DTYPES[result.dtype], options.device))
    request = Request(case, result.dtype, options.device)
    candidates, result.absent = gather(adapters or ADAPTERS, request, options.provider)
    candidates = [one for one in candidates if set(modes) & set(one.modes)]
    passed, peaks = check(workload, candidates, case, result, show)
    timers = [("torch", workload.baselines)]
    for provider in passed:
        timers += [(provider.name, timer) for timer in provider.timers(workload, modes)]
    limits = QUICK_LIMITS if options.quick or options.device == "cuda" else LIMITS
    if options.rounds:
        limits = (options.rounds, 0.0)
    samples: dict[Key, list[float]] = {}
    try:
        raised = interleave(timers, *limits, lambda n: show(f"timing, round {n}"), samples)
        for name, error in raised.items():
            note_failure(result, name, error)
        check_again(workload, passed, case, result, show)
    finally:
        fused = {provider.name for provider in passed if provider.fused}
        left_out = {**result.failures, **result.absent}
        for mode in (*BASELINES, *modes):
            for (its_mode, name), seconds in samples.items():
                if its_mode == mode and name not in left_out:
                    inputs = workload.original, workload.original_target
                    traffic = bytes_moved(*inputs, mode, name in fused)
                    work = operations(*inputs, mode)
                    peak = peaks.get(name, {}).get(mode)
                    result.timings.append(Timing(mode, name, traffic, work, peak, seconds))


def check(
    workload: Workload,
    candidates: list[Provider],
    case: Case,
    result: Result,
    show: Callable[[str], None],
) -> tuple[list[Provider], dict[str, dict[str, int | None]]]:
    """Returns the providers that pass, and their memory by mode; notes the others in `result`."""
    passed, peaks = [], {}
    show("float64 reference")
    compare = Check(workload, case.options)
    for provider in candidates:
        name = provider.name
        show(f"checking {name}")
        try:
            errors = compare(provider.loss)
            peaks[name] = workload.peak_bytes(provider.loss)
        except Exception as error:  # the others are still measured
            note_failure(result, name, error)
        else:
            result.errors[name] = errors
            passed.append(provider)
    return passed, peaks


def check_again(
    workload: Workload,
    providers: list[Provider],
    case: Case,
    result: Result,
    show: Callable[[str], None],
) -> None:
    """Checks with other logits after all calls: finds providers that return an earlier result."""
    show("checking again")
    workload.original.neg_()
    compare = Check(workload, case.options)
    for provider in providers:
        try:
            compare(provider.loss)
        except Exception as error:
            note_failure(result, provider.name, error)


def note_failure(result: Result, provider: str, error: Exception) -> None:
    """Notes a wrong result or an error of this package as a failure, other errors as absent.

    Lack of memory always counts as absent.
    """
    first_line = next(iter(str(error).strip().splitlines()), "")
    reason = f"{type(error).__name__}: {first_line}"
    if is_out_of_memory(error):
        result.absent[provider] = "out of memory"
    elif isinstance(error, WrongResult):
        result.failures[provider] = str(error)
    elif provider.startswith("fused_xent"):
        result.failures[provider] = reason
    else:
        result.absent[provider] = reason


def main(arguments: list[str]) -> int:
    """`python -m bench loss`."""
    command = Parser(prog="python -m bench loss", description=__doc__)
    names = names_of({device: suite.cases for device, suite in SUITES.items()})
    command.add_argument("case", nargs="*", help=names)
    command.add_argument("--rows", type=at_least(1), help="rows of a custom case")
    command.add_argument("--vocab", type=at_least(2), help="classes of a custom case")
    add_options(
        command,
        "may be repeated; default: all. backward and both also measure inplace "
        "(inplace_backward=True), "
        "both also fused (grad_in_forward=True)",
    )
    options = command.parse_args(arguments)
    jobs = []
    for case in chosen_cases(command, options):
        for dtype in dict.fromkeys(options.dtype or case.dtypes):
            jobs.append(job(case, dtype, options))
    return measure_all(command, options, jobs)[1]


def chosen_cases(command: Parser, options: argparse.Namespace) -> list[Case]:
    """Returns the cases that the options choose; ends the program if they are wrong."""
    suite = SUITES[options.device]
    for name in options.case:
        if name not in suite.cases:
            command.error(f"case must be one of {', '.join(suite.cases)}, got {name!r}")
    if (options.rows is None) != (options.vocab is None):
        command.error("--rows and --vocab must be given together")
    cases = [suite.cases[name] for name in dict.fromkeys(options.case)]
    if options.rows is not None:
        cases.append(Case("custom", (options.rows, options.vocab)))
    if not cases:
        cases = [suite.cases[name] for name in (suite.quick if options.quick else suite.default)]
        cases = [case for case in cases if not (case.soft and options.ignored)]
    return [
        Case(
            case.name,
            case.shape,
            case.soft or options.soft,
            case.dtypes,
            wanted_options(command, options, case.soft or options.soft),
        )
        for case in cases
    ]


def sweep_main(arguments: list[str]) -> int:
    """`python -m bench sweep`."""
    description = "Measures the loss at several numbers of classes, for `plot` to draw."
    command = Parser(prog="python -m bench sweep", description=description)
    vocabs = f"default {' '.join(map(str, SWEPT_VOCABS))}"
    command.add_argument("--vocab", type=at_least(2), nargs="+", metavar="V", help=vocabs)
    add_options(command, "may be repeated; default: forward and both")
    options = command.parse_args(arguments)
    options.mode = options.mode or ["forward", "both"]
    vocabs = options.vocab or (QUICK_VOCABS if options.quick else SWEPT_VOCABS)
    loss_options = wanted_options(command, options, options.soft)
    jobs = []
    for dtype in dict.fromkeys(options.dtype or [None]):
        for case in sweep(list(dict.fromkeys(vocabs)), options.device, options.soft, loss_options):
            jobs += [job(case, one, options) for one in ([dtype] if dtype else case.dtypes)]
    return measure_all(command, options, jobs)[1]
