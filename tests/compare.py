"""Comparison of losses and gradients with float64: the tolerances of all tests.

The truth is computed by torch's own operations in float64 from the same rounded inputs. A result
may differ from it by one rounding to its dtype, plus ``ERROR`` times the terms that it sums.
Gradients are compared entry by entry, relative to the entry: with one absolute tolerance, every
entry of a large vocabulary except the target's could be 0 unnoticed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import class_dim
from modes import MODES, roundings
from torch import Tensor

import fused_xent
from fused_xent import reference

ERROR = 5e-6  # relative to the terms, for all dtypes but float64


class Truth(NamedTuple):
    """Loss and gradient in float64, and the magnitude of the terms that each sums."""

    loss: Tensor
    loss_terms: Tensor
    gradient: Tensor
    gradient_terms: Tensor
    is_target: Tensor  # per entry of the gradient: at the row's target class
    error: float


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def label_weights(logits, target, weight=None, ignore_index=-100, label_smoothing=0.0) -> Tensor:
    """Return q of ``loss = -sum(q * log(p))``, in float64 and the logits' shape."""
    dim = class_dim(logits.shape)
    n_classes = logits.shape[dim]
    by_class = (-1,) + (1,) * (logits.dim() - dim - 1)
    weight = torch.ones(n_classes) if weight is None else weight
    weight = weight.double().reshape(by_class).expand(logits.shape)
    if target.is_floating_point():
        return weight * (target.double() * (1 - label_smoothing) + label_smoothing / n_classes)
    kept = (target != ignore_index).unsqueeze(dim)
    index = target.long().unsqueeze(dim).masked_fill(~kept, 0)
    onehot = torch.zeros(logits.shape, dtype=torch.float64).scatter_(dim, index, 1)
    spread = label_smoothing / max(n_classes, 1)
    q = weight * (onehot * (1 - label_smoothing)) + weight * spread
    return q * kept


def truth(logits, target, upstream=1.0, reduction="mean", **options) -> Truth:
    """Return torch's results in float64. The logits of ignored rows are replaced by 0."""
    dim = class_dim(logits.shape)
    exact = logits.detach().double()
    if not target.is_floating_point():
        ignored = target == options.get("ignore_index", -100)
        exact = exact.masked_fill(ignored.unsqueeze(dim), 0)
    exact = exact.requires_grad_()
    double = {k: v.double() if k == "weight" and v is not None else v for k, v in options.items()}
    target64 = target.detach().double() if target.is_floating_point() else target.long()
    loss = F.cross_entropy(exact, target64, reduction=reduction, **double)
    upstream = torch.as_tensor(upstream, dtype=torch.float64).expand(loss.shape)
    (gradient,) = torch.autograd.grad(loss, exact, upstream)

    q = label_weights(logits, target, **options).abs()
    log_p = exact.detach().log_softmax(dim)
    row_terms = (q * (1 - torch.where(q > 0, log_p, 0) / 10)).sum(dim)
    divisor, row_upstream = torch.ones((), dtype=torch.float64), upstream
    if reduction == "mean":
        divisor = _mean_divisor(target, row_terms.numel(), **options).abs()
    if reduction != "none":
        row_terms = row_terms.sum() / divisor
    else:
        row_upstream = upstream.unsqueeze(dim)
    q_terms = q * row_upstream.abs() / divisor
    gradient_terms = q_terms.sum(dim, keepdim=True) * log_p.exp() + q_terms
    is_target = torch.zeros(logits.shape, dtype=torch.bool)
    if not target.is_floating_point():
        index = target.long().masked_fill(ignored, 0).unsqueeze(dim)
        is_target.scatter_(dim, index, True)
    return Truth(
        *(loss.detach(), row_terms, gradient, gradient_terms, is_target),
        _error(logits.dtype, logits.shape[dim]),
    )


def _error(dtype: torch.dtype, n_classes: int) -> float:
    """Return the allowed relative error; for float64, that of torch's own sums."""
    return ERROR if dtype != torch.float64 else 1e-13 + n_classes * 1e-16


def _mean_divisor(target, n_rows, weight=None, ignore_index=-100, label_smoothing=0.0) -> Tensor:
    if target.is_floating_point():
        return torch.tensor(float(n_rows), dtype=torch.float64)
    kept = target[target != ignore_index].long()
    return weight.double()[kept].sum() if weight is not None else torch.tensor(float(len(kept)))


def half_ulp(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Return the absolute tolerance near 0: half the smallest subnormal, or a flush to 0."""
    acc = torch.finfo(accumulation_dtype(dtype))
    return max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2, 2 * acc.tiny)


def assert_loss(loss: Tensor, truth: Truth, dtype: torch.dtype) -> None:
    """Compare a loss, which must have this dtype."""
    assert loss.dtype == dtype
    assert loss.shape == truth.loss.shape
    tolerance = truth.error * truth.loss_terms + half_ulp(dtype) * truth.loss.abs() * 1.01
    _assert_within("loss", loss, truth.loss, tolerance + smallest(dtype))


def assert_gradient(gradient: Tensor, truth: Truth, dtype: torch.dtype, roundings: int = 1) -> None:
    """Compare a gradient of this dtype that was rounded at most this many times."""
    assert gradient.dtype == dtype
    assert gradient.shape == truth.gradient.shape
    relative = 1.01 * roundings * half_ulp(dtype)
    scale = truth.gradient_terms.amax() if truth.gradient.numel() else 0.0
    tolerance = truth.error * truth.gradient_terms + relative * truth.gradient.abs()
    tolerance = tolerance + roundings * smallest(dtype) * max(float(scale), 1.0)
    tolerance = tolerance.masked_fill(truth.gradient_terms == 0, 0)  # ignored: exactly 0
    for name, entries in (("target", truth.is_target), ("other", ~truth.is_target)):
        _assert_within(
            f"gradient of {name} class",
            *(x.masked_fill(~entries, 0) for x in (gradient, truth.gradient)),
            tolerance,
        )


def _assert_within(name: str, actual: Tensor, exact: Tensor, tolerance: Tensor) -> None:
    actual = actual.detach().double()
    unequal = ~((actual == exact) | (actual.isnan() & exact.isnan()))
    wrong = unequal & ~((actual - exact).abs() <= tolerance)
    if not wrong.any():
        return
    excess = ((actual - exact).abs() / tolerance).masked_fill(~wrong, 0).nan_to_num(nan=1e300)
    at = tuple(torch.unravel_index(excess.argmax(), excess.shape)) if excess.dim() else ()
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, at {tuple(int(i) for i in at)} "
        f"{actual[at].item():.9g} instead of {exact[at].item():.9g} (+- {tolerance[at].item():.3g})"
    )


NEAR_1_OPTIONS = {  # options, and what they multiply relative errors by
    "plain": ({}, 1),
    "z-loss": ({"lse_square_scale": 1e-4}, 1),
    "statistics": ({}, 1),
    "focal": ({"focal_gamma": 2.0}, 3),  # about the cube of the cross-entropy
    "softcap": ({"softcap": 60.0}, 5),  # the logits' own rounding, which the tanh magnifies
}


def check_near_1(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    option: str,
    mode: str,
    goal: float = 2e-6,
) -> None:
    """Check loss and target gradient of rows whose target is far above all other classes.

    The targets of the first rows are the first, second, middle and last class. Float64 alone would
    lose as many digits as float32 does, so the truth keeps the other classes apart.
    """
    options, factor = NEAR_1_OPTIONS[option]
    rows = (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows)
    for i, j in enumerate((0, 1, shape[1] // 2, shape[1] - 1)):
        target.view(-1)[i] = j
    index = target.unsqueeze(1)
    subnormal = 1e-40  # the spacing of bfloat16 numbers below float32's normal ones
    weight, tokens = torch.rand(shape[1], dtype=dtype) + 0.5, torch.rand(rows) + 0.5
    for gap in (8, 18, 30, 80):
        if gap == 80 and option == "focal":
            continue  # the loss is below the smallest float32 number
        logits = torch.randn(shape).to(dtype)
        if option != "softcap":  # which magnifies the rounding errors of greater logits
            # In every second row one class is far above all others but the target.
            logits.view(shape[0], shape[1], -1)[1::2, -1] += 12
        top = logits.scatter(1, index, -torch.inf).amax(1, keepdim=True)
        logits.scatter_(1, index, top + gap)
        leaf = logits.clone().requires_grad_()
        function = fused_xent.cross_entropy
        if option == "statistics":
            function = fused_xent.cross_entropy_with_statistics
        loss = function(
            leaf * 1,
            target,
            weight,
            reduction="none",
            token_weight=tokens,
            loss_dtype=torch.float64,
            **MODES[mode],
            **options,
        )
        loss = loss.loss if option == "statistics" else loss
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)

        exact = logits.double().requires_grad_()
        z = reference.transform(exact, options.get("softcap"), 1.0)
        z_target = z.gather(1, index)
        others = (z - z_target).exp().scatter(1, index, 0).sum(1)
        expected = others.log1p() * weight[target]
        if "focal_gamma" in options:
            expected = expected * (others / (1 + others)) ** 2
        gradient_terms = torch.zeros(())  # that cancel
        if "lse_square_scale" in options:
            lse = z_target.squeeze(1) + others.log1p()
            expected = expected + options["lse_square_scale"] * lse**2
            gradient_terms = 2 * options["lse_square_scale"] * lse.detach().abs() * tokens
        expected = expected * tokens
        (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
        relative = factor * (goal if dtype != torch.float64 else 1e-14)
        torch.testing.assert_close(loss, expected.detach(), rtol=relative, atol=subnormal)
        rounding = relative + roundings(mode) * torch.finfo(dtype).eps / 2
        actual, exact_gradient = (g.gather(1, index).squeeze(1) for g in (gradient, exact_gradient))
        errors = (actual.double() - exact_gradient).abs()
        smallest = torch.finfo(dtype).tiny  # processors may round numbers below it to 0
        allowed = rounding * exact_gradient.abs() + relative * gradient_terms + smallest
        assert (errors <= allowed).all(), (errors / allowed).max()
