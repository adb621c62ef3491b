"""Who is measured, and whether it tells the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_xent

from .cases import MODES
from .timing import Loss, Samples, Timer, Workload

# How far the loss and the gradient may be from float64 on the same rounded inputs, relatively.
# Wide enough for torch eager, which rounds to the dtype between passes; an entry left out, a stale
# buffer or a missing scale is far outside.
TOLERANCE = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (2e-3, 1e-2),
}


CHUNK = 1 << 26  # elements that are compared at a time: 512 MiB in float64


@dataclass(frozen=True)
class Provider:
    """A loss to measure, in those modes that its options touch."""

    name: str
    loss: Loss
    modes: tuple[str, ...] = MODES
    fused: bool = False  # loss and gradient in one pass
    indices_only: bool = False  # takes no soft labels

    def timers(self, workload: Workload, modes: list[str]) -> Iterator[Timer]:
        """What to run in a round: a forward pass, and a training step that gives two timings."""
        wanted = [mode for mode in self.modes if mode in modes]

        def forward() -> Samples:
            return {("forward", self.name): workload.forward(self.loss)[1]}

        def step() -> Samples:
            step = workload.step(self.loss)
            seconds = {"backward": step.backward, "both": step.forward + step.backward}
            return {(mode, self.name): seconds[mode] for mode in wanted if mode != "forward"}

        if "forward" in wanted:
            yield forward
        if set(wanted) - {"forward"}:
            yield step


def torch_eager(logits: Tensor, target: Tensor) -> Tensor:
    """What everyone else is compared with."""
    return F.cross_entropy(logits, target)


def providers() -> list[Provider]:
    """All providers, fresh for a case: torch.compile forgets the shapes of the one before."""
    torch.compiler.reset()
    inplace = partial(fused_xent.cross_entropy, inplace_backward=True)
    fused = partial(fused_xent.cross_entropy, grad_in_forward=True)
    return [
        Provider("torch eager", torch_eager),
        Provider("torch.compile", torch.compile(torch_eager, dynamic=False)),
        Provider("fused_xent", fused_xent.cross_entropy),
        Provider("fused_xent inplace", inplace, modes=("backward", "both")),
        Provider("fused_xent fused", fused, modes=("both",), fused=True),
    ]


class WrongResult(Exception):
    """A provider's loss or gradient is not what float64 gives."""


class Check:
    """Compares providers with torch's loss in float64, by chunks of rows that leave memory free."""

    def __init__(self, workload: Workload) -> None:
        """Computes the loss in float64, from the workload's rounded logits."""
        self.workload = workload
        logits = workload.original
        self.n_rows = n_rows = logits.numel() // logits.size(1)
        step = max(1, CHUNK * len(logits) // logits.numel())
        self.chunks = [slice(i, i + step) for i in range(0, len(logits), step)]
        # What one chunk gives is kept; of several, each is computed again for each provider.
        self._exact = lru_cache(maxsize=1)(self._compute_exact)
        self.loss = sum(self._exact(i)[0] for i in range(len(self.chunks)))
        # The mean's gradient has entries near 1 / (rows * classes), below the smallest half. So it
        # is judged as loss scaling would scale it: by a power of two, which no rounding disturbs.
        self.upstream = 2.0 ** min(n_rows.bit_length() - 1, 15)

    def __call__(self, provider: Provider) -> dict[str, float]:
        """Relative errors of the loss and the gradient. torch.compile compiles here, untimed.

        Raises:
            WrongResult: an error is beyond its tolerance, or not a number.
        """
        value, _ = self.workload.forward(provider.loss)
        step = self.workload.step(provider.loss, torch.full_like(value, self.upstream))
        losses = {"loss without grad": value, "loss": step.loss}
        errors = {name: abs(loss.item() / self.loss - 1) for name, loss in losses.items()}
        errors |= self._gradient_errors(step.grad_logits)
        loss_limit, gradient_limit = TOLERANCE[self.workload.original.dtype]
        for name, error in errors.items():
            limit = loss_limit if name in losses else gradient_limit
            if not error <= limit:  # a NaN is beyond every limit
                raise WrongResult(f"{name} is {error:.1e} off float64's, {limit:.0e} allowed")
        return errors

    def _compute_exact(self, chunk: int) -> tuple[float, Tensor]:
        """A chunk's part of the mean loss, and its gradient."""
        logits, target = (t[self.chunks[chunk]] for t in self._inputs)
        logits = logits.double().requires_grad_()
        target = target.double() if target.is_floating_point() else target
        loss = F.cross_entropy(logits, target, reduction="sum") / self.n_rows
        loss.backward()
        return loss.item(), logits.grad

    @property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.workload.original, self.workload.target

    def _gradient_errors(self, grad_logits: Tensor) -> dict[str, float]:
        """In the Euclidean norm. The targets' entries are judged apart: they outweigh the rest."""
        squares: dict[str, list[float]] = {}  # of the error and of what is right
        for i, rows in enumerate(self.chunks):
            exact = self._exact(i)[1]
            error = grad_logits[rows].double().div_(self.upstream).sub_(exact)
            for name, part in _parts(self.workload.target[rows]).items():
                sums = squares.setdefault(name, [0.0, 0.0])
                for j, tensor in enumerate((error, exact)):
                    sums[j] += part(tensor).norm().item() ** 2
        return {name: (error / exact) ** 0.5 for name, (error, exact) in squares.items()}


def _parts(target: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is judged apart of a gradient, and how to take it."""
    if target.is_floating_point():
        return {"gradient": lambda t: t}
    index = target.unsqueeze(1)
    return {
        "gradient at target": lambda t: t.gather(1, index),
        "gradient": lambda t: t.scatter(1, index, 0),
    }
