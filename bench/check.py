"""Checks providers: compares their loss and gradient with torch's in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import IGNORE_INDEX, Options, dense_labels, is_sparse
from .timing import Loss, Workload


class Tolerance(NamedTuple):
    """The largest relative errors allowed, against float64 on the same rounded inputs.

    Wide enough for torch eager, which rounds to the dtype between passes. These errors are small
    and random in each entry: they do not shift a row or a class as a whole, and hardly the scale.
    """

    loss: float
    gradient: float  # in the Euclidean norm
    part: float  # of the gradient of one row or one class, or at one target
    scale: float  # of the factor c for which c * exact gradient fits best; ideally 1


TOLERANCE = {
    torch.float32: Tolerance(1e-5, 1e-4, 1e-2, 1e-5),
    torch.bfloat16: Tolerance(2e-2, 5e-2, 2e-1, 1e-2),
    torch.float16: Tolerance(2e-3, 1e-2, 1e-1, 2e-3),
}
CHUNK = 1 << 25  # elements compared at a time: 256 MiB in float64


class WrongResult(Exception):
    """A provider's loss or gradient is wrong, or the provider wrote to the target."""


def torch_loss(logits: Tensor, target: Tensor, options: Options, reduction: str = "mean") -> Tensor:
    """Computes the loss with its options by torch operations, in the dtype of the logits."""
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
    """Compares providers with torch's loss in float64, in chunks of rows to save memory."""

    def __init__(self, workload: Workload, options: Options) -> None:
        """Computes the loss in float64 from the workload's rounded logits."""
        self.workload, self.options = workload, options
        logits, target = self._inputs
        self.n_rows = logits.numel() // logits.size(1)
        if not target.is_floating_point() and not is_sparse(logits, target):
            self.n_rows = int((target != IGNORE_INDEX).sum())
        step = max(1, CHUNK * len(logits) // logits.numel())
        self.chunks = [slice(i, i + step) for i in range(0, len(logits), step)]
        # Keeps the results of a single chunk; several are computed again for each provider.
        self._exact = lru_cache(maxsize=1)(self._compute_exact)
        self.loss = sum(self._exact(i)[0] for i in range(len(self.chunks)))
        # The gradient of the mean has entries near 1 / (rows * classes), too small for float16. So
        # it is scaled up, as loss scaling does, by a power of two, which adds no rounding.
        self.upstream = 2.0 ** min(max(self.n_rows, 1).bit_length() - 1, 15)

    def __call__(self, loss_function: Loss) -> dict[str, float]:
        """Returns relative errors of loss and gradient. torch.compile compiles here, untimed.

        Raises:
            WrongResult: an error exceeds its tolerance or is NaN, a shape is wrong, or the target
                has been written to.
        """
        value, _ = self.workload.forward(loss_function)
        step = self.workload.step(loss_function, torch.full_like(value, self.upstream))
        if not torch.equal(self.workload.target, self.workload.original_target):
            raise WrongResult("target has been written to")
        for name, tensor, shape in (
            ("loss", value, ()),
            ("gradient", step.grad_logits, self.workload.original.shape),
        ):
            if tensor.shape != shape:
                raise WrongResult(f"{name} has the shape {tuple(tensor.shape)}")
        tolerance = TOLERANCE[self.workload.original.dtype]
        losses = {"loss without grad": value, "loss": step.loss}
        errors = {
            name: (relative(abs(loss.item() - self.loss), abs(self.loss)), tolerance.loss)
            for name, loss in losses.items()
        }
        errors |= self._gradient_errors(step.grad_logits, tolerance)
        for name, (error, limit) in errors.items():
            if not error <= limit:  # also true for NaN
                raise WrongResult(f"{name} is {error:.1e} off float64's, {limit:.0e} allowed")
        return {name: error for name, (error, _) in errors.items()}

    def _compute_exact(self, chunk: int) -> tuple[float, Tensor]:
        """Returns a chunk's part of the mean loss, and its gradient."""
        logits, target = (t[self.chunks[chunk]] for t in self._inputs)
        logits = logits.double().requires_grad_()
        if is_sparse(logits, target):
            target = dense_labels(logits.detach(), target)
        target = target.double() if target.is_floating_point() else target
        loss = torch_loss(logits, target, self.options, "sum") / self.n_rows
        loss.backward()
        return loss.item(), logits.grad

    @property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.workload.original, self.workload.original_target

    def _gradient_errors(
        self, grad_logits: Tensor, tolerance: Tolerance
    ) -> dict[str, tuple[float, float]]:
        """Returns (error, limit) by name. Targets are judged separately: they outweigh the rest."""
        sums: dict[str, GradientSums] = {}
        for i, rows in enumerate(self.chunks):
            exact = self._exact(i)[1]
            gradient = grad_logits[rows].double().div_(self.upstream)
            for name, part in _parts(exact, self.workload.original_target[rows]).items():
                sums.setdefault(name, GradientSums()).add(part(gradient), part(exact))
        errors = {}
        for name, one in sums.items():
            errors |= {
                name: (one.error, tolerance.gradient),
                f"scale of the {name}": (one.scale_error, tolerance.scale),
            }
            if name == "gradient":
                errors["gradient of one row"] = (one.worst_row, tolerance.part)
                errors["gradient of one class"] = (one.worst_class, tolerance.part)
            else:
                errors["gradient at one target"] = (one.worst_entry, tolerance.part)
        return errors


class GradientSums:
    """Sums over chunks of rows: squares of exact values and of errors, in total and per class."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.squares = self.errors = self.products = self.worst_row = 0.0
        self.greatest = self.greatest_error = 0.0  # squared
        self.class_squares: Tensor | float = 0.0
        self.class_errors: Tensor | float = 0.0

    def add(self, gradient: Tensor, exact: Tensor) -> None:
        """Adds a chunk, (N, C, ...) in float64."""
        errors, squares = (gradient - exact).square(), exact.square()
        other_dims = [dim for dim in range(exact.ndim) if dim != 1]
        self.class_errors = self.class_errors + errors.sum(other_dims)
        self.class_squares = self.class_squares + squares.sum(other_dims)
        self.worst_row = max(self.worst_row, worst(errors.sum(1), squares.sum(1)))
        self.greatest = max(self.greatest, squares.max().item())
        self.greatest_error = max(self.greatest_error, errors.max().item())
        self.errors += errors.sum().item()
        self.squares += squares.sum().item()
        self.products += (gradient * exact).sum().item()

    @property
    def error(self) -> float:
        """The relative error in the Euclidean norm."""
        return relative(self.errors, self.squares) ** 0.5

    @property
    def scale_error(self) -> float:
        """The error of the factor c for which c * exact values fit best; ideally 1."""
        return relative(abs(self.products - self.squares), self.squares)

    @property
    def worst_entry(self) -> float:
        """The largest error of one entry, relative to the largest entry."""
        return relative(self.greatest_error, self.greatest) ** 0.5

    @property
    def worst_class(self) -> float:
        """The largest relative error of one class."""
        return worst(self.class_errors, self.class_squares)


def relative(error: float, right: float) -> float:
    """Returns `error / right`; infinity for any error of a value that must be 0."""
    if right == 0:
        return 0.0 if error == 0 else float("inf")
    return error / right


def worst(errors: Tensor, squares: Tensor) -> float:
    """Returns the largest relative error, from sums of squares; infinity for NaN."""
    ratios = torch.where(squares > 0, errors / squares, torch.where(errors == 0, 0.0, torch.inf))
    return ratios.nan_to_num(torch.inf, torch.inf).max().sqrt().item()


def _parts(logits: Tensor, target: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns the parts of a gradient that are judged separately: a function by name."""
    if target.is_floating_point():
        return {"gradient": lambda t: t}
    classes = target if is_sparse(logits, target) else target.unsqueeze(1)
    is_counted = classes != IGNORE_INDEX
    index = classes.clamp(min=0)  # ignored rows: all their entries are in the rest
    return {
        "gradient at target": lambda t: t.gather(1, index) * is_counted,
        "gradient": lambda t: t.scatter(1, index, t.gather(1, index) * ~is_counted),
    }
