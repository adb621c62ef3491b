"""Whether a provider tells the truth: its loss and gradient beside torch's in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import IGNORE_INDEX, Options
from .timing import Loss, Workload

# How far the loss and the gradient may be from float64 on the same rounded inputs, relatively.
# Wide enough for torch eager, which rounds to the dtype between passes; an entry left out, a stale
# buffer or a missing scale is far outside.
TOLERANCE = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (2e-3, 1e-2),
}
CHUNK = 1 << 26  # elements that are compared at a time: 512 MiB in float64


class WrongResult(Exception):
    """A provider's loss or gradient is not what float64 gives."""


def torch_loss(logits: Tensor, target: Tensor, options: Options, reduction: str = "mean") -> Tensor:
    """The loss with its options by torch's own operations, in the dtype of the logits."""
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    loss = F.cross_entropy(
        logits, target, reduction=reduction, label_smoothing=options.label_smoothing
    )
    if options.lse_square_scale:
        squares = torch.logsumexp(logits, 1).square()
        if not target.is_floating_point():
            squares = squares[target != IGNORE_INDEX]
        penalty = squares.sum() if reduction == "sum" else squares.mean()
        loss = loss + options.lse_square_scale * penalty
    return loss


class Check:
    """Compares providers with torch's loss in float64, by chunks of rows that leave memory free."""

    def __init__(self, workload: Workload, options: Options) -> None:
        """Computes the loss in float64, from the workload's rounded logits."""
        self.workload, self.options = workload, options
        logits, target = self._inputs
        self.n_rows = logits.numel() // logits.size(1)
        if not target.is_floating_point():
            self.n_rows = int((target != IGNORE_INDEX).sum())
        step = max(1, CHUNK * len(logits) // logits.numel())
        self.chunks = [slice(i, i + step) for i in range(0, len(logits), step)]
        # What one chunk gives is kept; of several, each is computed again for each provider.
        self._exact = lru_cache(maxsize=1)(self._compute_exact)
        self.loss = sum(self._exact(i)[0] for i in range(len(self.chunks)))
        # The mean's gradient has entries near 1 / (rows * classes), below the smallest half. So it
        # is judged as loss scaling would scale it: by a power of two, which no rounding disturbs.
        self.upstream = 2.0 ** min(max(self.n_rows, 1).bit_length() - 1, 15)

    def __call__(self, loss_function: Loss) -> dict[str, float]:
        """Relative errors of the loss and the gradient. torch.compile compiles here, untimed.

        Raises:
            WrongResult: an error is beyond its tolerance, or not a number.
        """
        value, _ = self.workload.forward(loss_function)
        step = self.workload.step(loss_function, torch.full_like(value, self.upstream))
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
        loss = torch_loss(logits, target, self.options, "sum") / self.n_rows
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
    is_counted = (target != IGNORE_INDEX).unsqueeze(1)
    index = target.unsqueeze(1).clamp(min=0)  # an ignored row's is judged with the rest
    return {
        "gradient at target": lambda t: t.gather(1, index) * is_counted,
        "gradient": lambda t: t.scatter(1, index, t.gather(1, index) * ~is_counted),
    }
