"""Measures the loss of a linear layer and its gradients, from hidden states to both.

Beside the loss of all logits, torch's own chunks, and what no implementation can do without: the
three bare matrix products, of the logits, of grad_hidden and of grad_weight. Each provider's
results are compared with float64 before it is timed, and the memory that it takes at once beyond
its inputs and outputs is measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_xent

from .cases import DTYPES
from .command import Parser, at_least
from .device import PeakMemory, clock
from .peers import LINEAR_PEERS, LinearLoss, peers
from .providers import CHUNK, WrongResult
from .report import Environment, Progress, environment, summary, write_json
from .timing import interleave

CASES = {  # rows, features, classes
    "cpu": {"llama2": (1024, 512, 32000), "llama3": (512, 512, 128256)},
    "cuda": {
        "llama3-1k": (1024, 4096, 128256),
        "llama3-4k": (4096, 4096, 128256),
        "llama3-8k": (8192, 4096, 128256),
        "llama3-16k": (16384, 4096, 128256),
    },
}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
# How far gradients may be from float64 of the same inputs, relatively: products of 16-bit numbers
# are of logits that were rounded to 16 bits. What is left out or counted twice is farther.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
BARE, UNFUSED = "three bare products", "F.linear, F.cross_entropy"
NAMES = ("grad_hidden", "grad_weight")
HEAD = ("ms", "quartiles", "x bare", "memory MB", *NAMES)
WIDTHS = (9, 18, 8, 11, 12, 12)


@dataclass
class Measurement:
    """What one provider took."""

    provider: str
    peak_bytes: int | None  # beyond inputs and outputs
    errors: dict[str, float]  # of each gradient, relative to float64
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass
class Result:
    """All measurements of one case in one dtype, taken in one interleaved run."""

    case: str
    shape: tuple[int, int, int]
    dtype: str
    measurements: list[Measurement]
    failures: dict[str, str]

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.case}  {'x'.join(map(str, self.shape))}  {self.dtype}"


def unfused(hidden: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """The loss of logits that are all there at once."""
    return F.cross_entropy(F.linear(hidden, linear_weight), target)


def providers(device: str) -> tuple[dict[str, LinearLoss], dict[str, str]]:
    """Those that are here, and of those for GPUs alone why others are not."""
    found: dict[str, LinearLoss] = {UNFUSED: unfused}
    others, missing = [], {}
    if device == "cuda":
        torch.compiler.reset()
        found["the same, torch.compile"] = torch.compile(unfused, dynamic=False)
        others, missing = peers(LINEAR_PEERS)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def in_chunks(*arguments: Tensor) -> Tensor:
            return F.linear_cross_entropy(*arguments, options=options)

        found["torch, chunked"] = in_chunks
    return found | {"fused_xent": fused_xent.linear_cross_entropy, **dict(others)}, missing


class Workload:
    """The inputs of a case, and what is right of their gradients."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        """Inputs are the same in every run."""
        n_rows, n_features, n_classes = shape
        source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.hidden = torch.randn(n_rows, n_features, **source).to(dtype)
        weight = torch.randn(n_classes, n_features, **source) * n_features**-0.5
        self.weight = weight.to(dtype)
        self.target = torch.randint(n_classes, (n_rows,), **source)
        self.device, self.clock = device, clock(device)
        self.exact = self._exact(max(1, CHUNK // n_classes))

    def _exact(self, chunk_rows: int) -> tuple[float, Tensor, Tensor]:
        """The loss and its gradients in float64, by chunks of rows that leave memory free."""
        weight = self.weight.double().requires_grad_()
        total, grad_hidden, grad_weight = 0.0, [], torch.zeros_like(weight.detach())
        for hidden, target in zip(
            self.hidden.split(chunk_rows), self.target.split(chunk_rows), strict=True
        ):
            leaf = hidden.double().requires_grad_()
            part = F.cross_entropy(F.linear(leaf, weight), target, reduction="sum")
            loss = part / len(self.hidden)
            total += loss.item()
            for_hidden, for_weight = torch.autograd.grad(loss, (leaf, weight))
            grad_hidden.append(for_hidden)
            grad_weight += for_weight
        return total, torch.cat(grad_hidden), grad_weight

    def step(self, loss_function: LinearLoss) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its gradients, of leaves that share the inputs' memory."""
        leaves = [x.detach().requires_grad_() for x in (self.hidden, self.weight)]
        loss = loss_function(*leaves, self.target)
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    def seconds(self, run: Callable[[], object]) -> float:
        """What a run takes, its outputs included, which are freed after it."""
        start = self.clock.start()
        outputs = run()
        end = self.clock.mark()
        del outputs
        return self.clock.seconds(start, end)

    def bare_seconds(self) -> float:
        """What the three products take without the sum that stands for the loss."""
        logits: list[Tensor] = []
        total = self.seconds(lambda: logits.append(self.hidden @ self.weight.t()))
        total += self.seconds(lambda: logits[0] @ self.weight)
        return total + self.seconds(lambda: logits[0].t() @ self.hidden)

    def check(self, loss_function: LinearLoss) -> dict[str, float]:
        """The errors of the gradients.

        Raises:
            WrongResult: one of them, or of the loss, is beyond the tolerance, or not a number.
        """
        loss, *gradients = self.step(loss_function)
        exact_loss, *exact = self.exact
        errors = {
            name: float((one.double() - right).norm() / right.norm())
            for name, one, right in zip(NAMES, gradients, exact, strict=True)
        }
        tolerance = TOLERANCE[self.hidden.dtype]
        for name, error in {"loss": abs(loss.item() / exact_loss - 1), **errors}.items():
            if not error <= tolerance:
                raise WrongResult(f"{name} is {error:.1e} off float64's, {tolerance:.0e} allowed")
        return errors

    def peak_bytes(self, loss_function: LinearLoss) -> int | None:
        """The most memory at once beyond inputs and outputs, of a step that is not the first."""
        with PeakMemory(self.device) as memory:
            outputs = self.step(loss_function)
        if memory.bytes is None:
            return None
        return max(0, memory.bytes - sum(output.nbytes for output in outputs))


def measure(
    case: str, dtype: str, options, progress: Progress, shape: tuple[int, int, int]
) -> Result:
    """Checks every provider in one case, then times those that passed, in turn."""
    progress.show("float64 reference")
    workload = Workload(shape, DTYPES[dtype], options.device)
    candidates, _ = providers(options.device)
    found, failures = {BARE: Measurement(BARE, None, {})}, {}
    for name, loss_function in candidates.items():
        progress.show(f"checking {name}")
        try:
            errors = workload.check(loss_function)
            found[name] = Measurement(name, workload.peak_bytes(loss_function), errors)
        except Exception as error:  # whatever one raises, the others are still measured
            failures[name] = f"{type(error).__name__}: {error}"
    workload.exact = ()  # its memory is of no use from here on
    timers = [lambda: {("step", BARE): workload.bare_seconds()}]
    for name, loss_function in candidates.items():
        if name in found:
            timers.append(
                lambda name=name, loss_function=loss_function: {
                    ("step", name): workload.seconds(lambda: workload.step(loss_function))
                }
            )
    samples = interleave(timers, options.rounds, 0.0, lambda n: progress.show(f"timing, round {n}"))
    for (_, name), seconds in samples.items():
        found[name].seconds = seconds
    return Result(case, shape, dtype, list(found.values()), failures)


def cells(result: Result, measured: Measurement) -> list[str]:
    """One row of a table."""
    first, third = measured.seconds[0], measured.seconds[0]
    if len(measured.seconds) > 1:
        first, _, third = statistics.quantiles(measured.seconds, n=4, method="inclusive")
    peak = measured.peak_bytes
    return [
        f"{measured.median * 1e3:.0f}",
        f"{first * 1e3:.0f}-{third * 1e3:.0f}",
        f"{measured.median / result.measurements[0].median:.2f}",
        "-" if peak is None else f"{peak / 1e6:.1f}",
        *(f"{measured.errors[name]:.1e}" if measured.errors else "-" for name in NAMES),
    ]


def terminal(result: Result) -> Iterator[str]:
    """Lines of one case's table."""
    yield result.title
    yield " " * 28 + "".join(map(str.rjust, HEAD, WIDTHS))
    for measured in result.measurements:
        yield f"  {measured.provider:26}" + "".join(map(str.rjust, cells(result, measured), WIDTHS))
    yield ""


def markdown(results: list[Result], env: Environment) -> Iterator[str]:
    """Lines of a table for the README."""
    yield "| rows x features x classes | | ms | x bare | memory, MB | error of grad_weight |"
    yield "|---|---|---:|---:|---:|---:|"
    for result in results:
        for i, measured in enumerate(result.measurements):
            title = f"{' x '.join(map(str, result.shape))} {result.dtype}" if i == 0 else ""
            ms, _, ratio, memory, _, error = cells(result, measured)
            yield f"| {title} | {measured.provider} | {ms} | {ratio} | {memory} | {error} |"
    yield ""
    yield f"{summary(env)}. `{env['command']}`"


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="python -m bench linear", description=__doc__)
    names = dict.fromkeys(name for cases in CASES.values() for name in cases)
    result.add_argument("case", nargs="*", help=f"any of {', '.join(names)}")
    for name in ("rows", "features", "vocab"):
        result.add_argument(f"--{name}", type=at_least(1), help="of a case of your own")
    result.add_argument("--dtype", action="append", choices=DTYPES, help="may be given repeatedly")
    rounds = "how often each is timed, default 5; 16-bit products take minutes on many CPUs"
    result.add_argument("--rounds", type=at_least(1), default=5, help=rounds)
    result.add_common()
    return result


def chosen_cases(command: Parser, options) -> dict[str, tuple[int, int, int]]:
    """The cases that the options name; ends the program where they name none."""
    known = CASES[options.device]
    for name in options.case:
        if name not in known:
            command.error(f"case must be one of {', '.join(known)}, got {name!r}")
    cases = {name: known[name] for name in options.case}
    own = (options.rows, options.features, options.vocab)
    if None not in own:
        cases["custom"] = own
    elif own != (None, None, None):
        command.error("--rows, --features and --vocab must be given together")
    return cases or known


def main(arguments: list[str]) -> int:
    """Measures what the arguments name. Returns 1 where a provider was wrong, else 0."""
    command = parser()
    options = command.parse_args(arguments)
    cases = chosen_cases(command, options)
    command.check_common(options)
    env = environment(options.device)
    if not options.markdown:
        print(summary(env), end="\n\n")
    for name, reason in providers(options.device)[1].items():
        print(f"not measured: {name} ({reason})", file=sys.stderr)
    dtypes = options.dtype or DEFAULT_DTYPES[options.device]
    runs = [(case, dtype) for case in cases for dtype in dtypes]
    progress, results = Progress(len(runs)), []
    for case, dtype in runs:
        progress.start(f"{case} {dtype}")
        results.append(measure(case, dtype, options, progress, cases[case]))
        progress.clear()
        if not options.markdown:
            print(*terminal(results[-1]), sep="\n", flush=True)
        for provider, reason in results[-1].failures.items():
            print(f"FAILED {results[-1].title}: {provider}: {reason}", file=sys.stderr)
        if options.json:  # after each, which may take minutes
            write_json(options.json, results, env)
    if options.markdown:
        print(*markdown(results, env), sep="\n")
    return 1 if any(result.failures for result in results) else 0
