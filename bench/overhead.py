"""Measures the overhead of a call: the time of a loss on tiny inputs, on one CPU thread.

There is almost nothing to compute, so the time goes to Python, checks, dispatch and autograd. A
sample is the mean of several calls in a row; providers are timed in turn. Each provider's results
are compared with float64 before it is timed. The in-place modes of fused_xent are left out. On a
GPU the host's time is measured too, which ends when the last call has been issued, and the kernels
that a call launches are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_xent

from . import linear, loss
from .cases import DTYPES, Case
from .command import Job, Parser, measure_all
from .loss import note_failure
from .providers import ADAPTERS, Provider, Request, gather
from .results import HOST_MODES, Result, Timing
from .timing import Key, Samples, Timer, Workload, interleave

Losses = list[tuple[str, Callable[..., Tensor]]]  # (provider, loss)
Show = Callable[[str], None]
MODES = ("forward", "both")
CALLS = 10  # per sample: few, so that a busy machine rarely interrupts one
ROUNDS, QUICK_ROUNDS = 300, 60  # samples
QUICK = ("tiny", "linear")


def eager_module(request: Request) -> list[Provider]:
    """The baseline of all ratios."""
    return [Provider("torch eager", torch.nn.CrossEntropyLoss())]


def compiled_module(request: Request) -> list[Provider]:
    """Compiled for this case only."""
    torch.compiler.reset()
    return [Provider("torch.compile", torch.compile(torch.nn.CrossEntropyLoss(), dynamic=False))]


def our_module(request: Request) -> list[Provider]:
    """With default options."""
    return [Provider("fused_xent", fused_xent.CrossEntropyLoss())]


MODULES = {"torch eager": eager_module, "torch.compile": compiled_module, "fused_xent": our_module}


def of_logits(
    adapters: dict[str, Callable[[Request], list[Provider]]],
    options: argparse.Namespace,
    result: Result,
    show: Show,
) -> tuple[Sequence[Tensor], Losses]:
    """Returns logits and target, and the losses that pass the check."""
    case = Case(result.case, result.shape)
    workload = Workload(*case.tensors(DTYPES[result.dtype], options.device))
    request = Request(case, result.dtype, options.device)
    candidates, result.absent = gather(adapters, request, options.provider)
    candidates = [one for one in candidates if "forward" in one.modes]
    passed, _ = loss.check(workload, candidates, case, result, show)
    inputs = workload.original, workload.original_target
    return inputs, [(provider.name, provider.loss) for provider in passed]


def of_hidden_states(
    options: argparse.Namespace, result: Result, show: Show
) -> tuple[Sequence[Tensor], Losses]:
    """Returns hidden states, weight and target, and the losses that pass the check."""
    workload = linear.Workload(result.shape, DTYPES[result.dtype], options.device)
    candidates, result.absent = gather(linear.ADAPTERS, options.device, options.provider)
    passed, _ = linear.check(workload, candidates, result, show)
    return (workload.hidden, workload.weight, workload.target), passed


CASES = {  # (shape of the logits, or rows, features and classes; function that prepares it)
    "tiny": ((4, 9), partial(of_logits, ADAPTERS)),
    "module": ((4, 9), partial(of_logits, MODULES)),
    "small": ((8, 10), partial(of_logits, ADAPTERS)),
    "cifar": ((128, 10), partial(of_logits, ADAPTERS)),
    "imagenet": ((128, 1000), partial(of_logits, ADAPTERS)),
    "linear": ((4, 8, 9), of_hidden_states),
}


class Call:
    """A loss with its own copy of the inputs, because some losses write to them."""

    def __init__(self, loss_function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Copies the inputs."""
        copies = (one.detach().clone() for one in inputs)
        self.inputs = [one.requires_grad_(one.is_floating_point()) for one in copies]
        self.leaves = [one for one in self.inputs if one.requires_grad]
        self.forward = partial(loss_function, *self.inputs)

    def both(self) -> None:
        """Runs forward and backward, with new gradients each time."""
        self.forward().backward()
        for leaf in self.leaves:
            leaf.grad = None

    def run(self, mode: str, n_calls: int) -> None:
        """Makes `n_calls` calls in a row."""
        call = getattr(self, mode)
        with torch.set_grad_enabled(mode != "forward"):
            for _ in range(n_calls):
                call()

    def sample(self, mode: str, provider: str) -> Samples:
        """Returns seconds per call; on a GPU, also those of the host alone."""
        is_cuda = self.inputs[0].is_cuda
        start = perf_counter()
        self.run(mode, CALLS)
        issued = perf_counter()
        if not is_cuda:
            return {(mode, provider): (issued - start) / CALLS}
        torch.cuda.synchronize()
        done = perf_counter()
        of_host = {(f"host {mode}", provider): (issued - start) / CALLS}
        return {(mode, provider): (done - start) / CALLS, **of_host}

    def n_kernels(self, mode: str) -> int | None:
        """Counts the kernels that a call launches; None on a CPU."""
        if not self.inputs[0].is_cuda:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            self.run(mode, 1)
            torch.cuda.synchronize()
        return sum("LaunchKernel" in event.name for event in recorded.events())


def measure(prepare: Callable, options: argparse.Namespace, result: Result, show: Show) -> None:
    """Checks every provider in one case, then times those that passed, in turn."""
    inputs, losses = prepare(options, result, show)
    calls = {name: Call(loss_function, inputs) for name, loss_function in losses}
    timers: list[tuple[str, Timer]] = [
        (name, partial(call.sample, mode, name)) for name, call in calls.items() for mode in MODES
    ]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    samples: dict[Key, list[float]] = {}
    try:
        interleave(timers, 1, 0.0, lambda _: show("warming up"), {})
        raised = interleave(timers, rounds, 0.0, lambda n: show(f"timing, round {n}"), samples)
        for name, error in raised.items():
            note_failure(result, name, error)
    finally:
        left_out = {**result.failures, **result.absent}
        for mode in (*MODES, *HOST_MODES):
            for (its_mode, name), seconds in samples.items():
                if its_mode == mode and name not in left_out:
                    kernels = calls[name].n_kernels(mode) if mode in MODES else None
                    result.timings.append(Timing(mode, name, 0, 0, None, seconds, kernels))


def main(arguments: list[str]) -> int:
    """`python -m bench overhead`."""
    command = Parser(prog="python -m bench overhead", description=__doc__)
    command.add_argument("case", nargs="*", help=f"one of {', '.join(CASES)}")
    command.add_common([*dict.fromkeys([*ADAPTERS, *linear.ADAPTERS])])
    options = command.parse_args(arguments)
    for name in options.case:
        if name not in CASES:
            command.error(f"case must be one of {', '.join(CASES)}, got {name!r}")
    names = dict.fromkeys(options.case or (QUICK if options.quick else CASES))
    jobs = []
    for name in names:
        shape, prepare = CASES[name]
        for dtype in dict.fromkeys(options.dtype or ["float32"]):
            result = Result("overhead", name, shape, dtype)
            jobs.append(Job(result, 0, partial(measure, prepare, options)))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_all(command, options, jobs)[1]
    finally:
        torch.set_num_threads(n_threads)
