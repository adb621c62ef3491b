"""Measures a linear layer with its loss, from hidden states to the loss and both gradients.

The comparison has the loss of all logits at once, torch's chunked loss, and the three bare matrix
products that every implementation needs: of the logits, of grad_hidden and of grad_weight. Each
provider's results are compared with float64 before it is timed, and its peak memory beyond inputs
and outputs is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_xent

from .cases import DTYPES, dense_labels, is_sparse
from .check import CHUNK, WrongResult
from .command import Job, Parser, at_least, measure_all, names_of
from .device import PeakMemory, clock
from .loss import note_failure
from .providers import Unsupported, gather
from .results import Result, Timing
from .timing import Key, interleave

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and target
Found = list[tuple[str, LinearLoss]]

CASES = {  # rows, features, classes
    "cpu": {"llama2": (1024, 512, 32000), "llama3": (512, 512, 128256)},
    "cuda": {
        "llama3-1k": (1024, 4096, 128256),
        "llama3-4k": (4096, 4096, 128256),
        "llama3-8k": (8192, 4096, 128256),
        "llama3-16k": (16384, 4096, 128256),
    },
}
QUICK = {"cpu": {"small": (256, 256, 32000)}, "cuda": {"llama3-4k": CASES["cuda"]["llama3-4k"]}}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
# The largest relative errors of loss and gradients, against float64 on the same inputs. They allow
# for logits that were rounded to 16 bits, but not for a chunk that is left out or counted twice.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
BARE, STEP = "bare products", "step"
NAMES = ("grad_hidden", "grad_weight")
ROUNDS, QUICK_ROUNDS = 5, 2


def unfused(hidden: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """Computes the loss from all logits at once."""
    return F.cross_entropy(F.linear(hidden, linear_weight), target)


def torch_eager(device: str) -> Found:
    """The baseline of all ratios."""
    return [("torch eager", unfused)]


def torch_compile(device: str) -> Found:
    """On a GPU only: on a CPU, torch.compile fuses nothing with the products."""
    if device != "cuda":
        raise Unsupported("is the same as eager on a CPU: fuses nothing with the products")
    torch.compiler.reset()
    return [("torch.compile", torch.compile(unfused, dynamic=False))]


def torch_chunked(device: str) -> Found:
    """Exists in torch 2.13 and later."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return [("torch chunked", partial(F.linear_cross_entropy, options=options))]


def ours(device: str) -> Found:
    """In chunks of rows; the gradient overwrites the logits of a chunk."""
    return [("fused_xent", fused_xent.linear_cross_entropy)]


def needs_gpu(device: str) -> None:
    """Raises Unsupported if the device is not a GPU."""
    if device != "cuda":
        raise Unsupported("needs a GPU")


def liger(device: str) -> Found:
    """In chunks of rows; the forward computes the gradients."""
    needs_gpu(device)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return [("liger-kernel", liger_fused_linear_cross_entropy)]


def quack(device: str) -> Found:
    """In chunks of rows, with its own matrix products."""
    needs_gpu(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return [("quack-kernels", chunked_linear_cross_entropy)]


def cut(device: str) -> Found:
    """Computes the logits twice. By default it skips gradients too small for 16 bits."""
    needs_gpu(device)
    from cut_cross_entropy import linear_cross_entropy

    return [
        ("cut-cross-entropy", linear_cross_entropy),
        ("cut-cross-entropy, exact", partial(linear_cross_entropy, filter_eps=None)),
    ]


Adapters = dict[str, Callable[[str], Found]]
ADAPTERS: Adapters = {
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "torch chunked": torch_chunked,
    "fused_xent": ours,
    "liger-kernel": liger,
    "quack-kernels": quack,
    "cut-cross-entropy": cut,
}


class Workload:
    """The inputs of a case, with their exact loss and gradients."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, n_labels: int = 0
    ) -> None:
        """Makes the inputs, the same in every run; with `n_labels`, so many classes in each row."""
        n_rows, n_features, n_classes = shape
        source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.hidden = torch.randn(n_rows, n_features, **source).to(dtype)
        weight = torch.randn(n_classes, n_features, **source) * n_features**-0.5
        self.weight = weight.to(dtype)
        positions = (n_rows, n_labels) if n_labels else (n_rows,)
        self.target = torch.randint(n_classes, positions, **source)
        self.device, self.clock = device, clock(device)
        self.exact = self._exact()
        size = self.hidden.element_size()
        # Each input is read once, and the gradients of hidden and weight are written.
        self.bytes = 2 * size * n_features * (n_rows + n_classes) + self.target.nbytes
        # The gradients of a loss are known in the forward. Those of log-probabilities are not, so
        # the logits are computed twice.
        self.logits_products = 2 if n_labels else 1
        self.operations = 2 * (self.logits_products + 2) * n_rows * n_features * n_classes

    def negate(self) -> None:
        """Makes other hidden states, and their exact results."""
        self.hidden.neg_()
        self.exact = self._exact()

    def _exact(self) -> tuple[float, Tensor, Tensor]:
        """Computes the loss and its gradients in float64, in chunks of rows to save memory."""
        chunk_rows = max(1, CHUNK // len(self.weight))
        weight = self.weight.double().requires_grad_()
        total, grad_hidden, grad_weight = 0.0, [], torch.zeros_like(weight.detach())
        for hidden, target in zip(
            self.hidden.split(chunk_rows), self.target.split(chunk_rows), strict=True
        ):
            leaf = hidden.double().requires_grad_()
            logits = F.linear(leaf, weight)
            labels = dense_labels(logits, target) if is_sparse(logits, target) else target
            part = F.cross_entropy(logits, labels, reduction="sum")
            loss = part / len(self.hidden)
            total += loss.item()
            for_hidden, for_weight = torch.autograd.grad(loss, (leaf, weight))
            grad_hidden.append(for_hidden)
            grad_weight += for_weight
        return total, torch.cat(grad_hidden), grad_weight

    def step(self, loss_function: LinearLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss and its gradients, for leaves that share the inputs' memory."""
        leaves = [x.detach().requires_grad_() for x in (self.hidden, self.weight)]
        loss = loss_function(*leaves, self.target)
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    def seconds(self, run: Callable[[], object]) -> float:
        """Returns the seconds of a run, without those to free its outputs."""
        start = self.clock.start()
        outputs = run()
        end = self.clock.mark()
        del outputs
        return self.clock.seconds(start, end)

    def bare_seconds(self) -> float:
        """Returns the seconds of the matrix products, without any loss."""
        logits: list[Tensor] = []
        total = 0.0
        for _ in range(self.logits_products):
            logits.clear()
            total += self.seconds(lambda: logits.append(self.hidden @ self.weight.t()))
        total += self.seconds(lambda: logits[0] @ self.weight)
        return total + self.seconds(lambda: logits[0].t() @ self.hidden)

    def check(self, loss_function: LinearLoss) -> dict[str, float]:
        """Returns the errors of the gradients.

        Raises:
            WrongResult: an error of a gradient or the loss exceeds the tolerance or is NaN, or the
                target has been written to.
        """
        target = self.target.clone()
        loss, *gradients = self.step(loss_function)
        if not torch.equal(target, self.target):
            self.target.copy_(target)
            raise WrongResult("target has been written to")
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
        """Returns peak memory beyond inputs and outputs. The first step was that of `check`."""
        with PeakMemory(self.device) as memory:
            outputs = self.step(loss_function)
        if memory.bytes is None:
            return None
        return max(0, memory.bytes - sum(output.nbytes for output in outputs))


def bytes_needed(shape: tuple[int, int, int], dtype: str) -> int:
    """Returns the memory that a measurement needs."""
    n_rows, n_features, n_classes = shape
    size = DTYPES[dtype].itemsize
    # Inputs, two gradients of each, both also in float64, and a chunk of logits in float64.
    needed = (n_rows + n_classes) * n_features * (3 * size + 3 * 8)
    return needed + 4 * 8 * min(n_rows * n_classes, max(CHUNK, n_classes))


def job(case: str, shape: tuple[int, int, int], dtype: str, options: argparse.Namespace) -> Job:
    """Makes the job that measures a case in a dtype."""
    result = Result("linear", case, shape, dtype)
    return Job(result, bytes_needed(shape, dtype), partial(measure, options))


def measure(
    options: argparse.Namespace,
    result: Result,
    show: Callable[[str], None],
    adapters: Adapters | None = None,
    n_labels: int = 0,
) -> None:
    """Checks every provider in one case, then times those that passed, in turn."""
    show("float64 reference")
    workload = Workload(result.shape, DTYPES[result.dtype], options.device, n_labels)
    candidates, result.absent = gather(adapters or ADAPTERS, options.device, options.provider)
    passed, peaks = check(workload, candidates, result, show)
    timers = [(BARE, lambda: {(STEP, BARE): workload.bare_seconds()})]
    timers += [(name, partial(step_samples, workload, name, one)) for name, one in passed]
    workload.exact = ()  # frees its memory for the timings
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    samples: dict[Key, list[float]] = {}
    try:
        raised = interleave(timers, rounds, 0.0, lambda n: show(f"timing, round {n}"), samples)
        for name, error in raised.items():
            note_failure(result, name, error)
        show("checking again")
        workload.negate()  # finds a provider that returns an earlier result
        for name, loss_function in passed:
            try:
                workload.check(loss_function)
            except Exception as error:
                note_failure(result, name, error)
    finally:
        left_out = {**result.failures, **result.absent}
        for (_, name), seconds in samples.items():
            if name not in left_out:
                work = workload.bytes, workload.operations
                result.timings.append(Timing(STEP, name, *work, peaks.get(name), seconds))


def check(
    workload: Workload, candidates: Found, result: Result, show: Callable[[str], None]
) -> tuple[Found, dict[str, int | None]]:
    """Returns the providers that pass, and their memory; notes the others in `result`."""
    passed, peaks = [], {}
    for name, loss_function in candidates:
        show(f"checking {name}")
        try:
            errors = workload.check(loss_function)
            peaks[name] = workload.peak_bytes(loss_function)
        except Exception as error:  # the others are still measured
            note_failure(result, name, error)
        else:
            result.errors[name] = errors
            passed.append((name, loss_function))
    return passed, peaks


def step_samples(workload: Workload, name: str, loss_function: LinearLoss) -> dict[Key, float]:
    """Times a step."""
    return {(STEP, name): workload.seconds(lambda: workload.step(loss_function))}


def main(arguments: list[str]) -> int:
    """`python -m bench linear`."""
    command = Parser(prog="python -m bench linear", description=__doc__)
    command.add_argument("case", nargs="*", help=names_of(CASES))
    for name, least in {"rows": 1, "features": 1, "vocab": 2}.items():
        command.add_argument(f"--{name}", type=at_least(least), help="of a custom case")
    command.add_common(list(ADAPTERS))
    options = command.parse_args(arguments)
    dtypes = dict.fromkeys(options.dtype or DEFAULT_DTYPES[options.device])
    cases = chosen_cases(command, options)
    jobs = [job(name, cases[name], dtype, options) for name in cases for dtype in dtypes]
    return measure_all(command, options, jobs)[1]


def chosen_cases(command: Parser, options: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Returns the cases that the options choose; ends the program if they are wrong."""
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
    return cases or (QUICK[options.device] if options.quick else known)
