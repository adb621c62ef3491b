"""Who is measured, and whether it tells the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

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


@dataclass(frozen=True)
class Provider:
    """A loss to measure, in those modes that its options touch."""

    name: str
    loss: Loss
    modes: tuple[str, ...] = MODES
    fused: bool = False  # loss and gradient in one pass

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
    """Compares providers with torch's loss in float64."""

    def __init__(self, workload: Workload) -> None:
        """Computes the loss and the gradient in float64, from the workload's rounded logits."""
        self.workload = workload
        target = workload.target
        logits = workload.original.double().requires_grad_()
        loss = F.cross_entropy(logits, target.double() if target.is_floating_point() else target)
        loss.backward()
        self.loss, self.grad_logits = loss.item(), logits.grad
        # The mean's gradient has entries near 1 / (rows * classes), below the smallest half. So it
        # is judged as loss scaling would scale it: by a power of two, which no rounding disturbs.
        n_rows = logits.numel() // logits.size(1)
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

    def _gradient_errors(self, grad_logits: Tensor) -> dict[str, float]:
        """In the Euclidean norm. The targets' entries are judged apart: they outweigh the rest."""
        error = grad_logits.double().div_(self.upstream).sub_(self.grad_logits)
        if self.workload.target.is_floating_point():
            return {"gradient": _ratio(error, self.grad_logits)}
        target = self.workload.target.unsqueeze(1)
        return {
            "gradient at target": _ratio(*(t.gather(1, target) for t in (error, self.grad_logits))),
            "gradient": _ratio(*(t.scatter(1, target, 0) for t in (error, self.grad_logits))),
        }


def _ratio(error: Tensor, expected: Tensor) -> float:
    return (error.norm() / expected.norm()).item()
