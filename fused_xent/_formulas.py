"""The loss and its derivatives by torch operations.

Used for gradients of class weights, token weights, the normalizer and probabilities, for gradients
of gradients, and for decompositions of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._options import REDUCTION_NAMES, REDUCTIONS
from ._problem import Problem, Saved, Upstream, accumulation_dtype, row_shape


def by_torch(problem: Problem) -> reference.CrossEntropyStatistics:
    """Compute the loss in the kernels' precision, not yet cast to its dtype."""
    logits: Any  # for mypy: these two are never None
    target: Any
    acc = accumulation_dtype(problem.logits.dtype)
    logits, target, weight, token_weight, normalizer = (
        tensor.to(acc) if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in problem[:-1]
    )
    settings = problem.settings
    return reference.cross_entropy_with_statistics(
        logits,
        target,
        weight,
        reduction=REDUCTION_NAMES[settings.reduction],
        dim=settings.dim,
        token_weight=token_weight,
        normalizer=normalizer,
        **settings.of_operators,
    )


def gradients(problem: Problem, upstream: Upstream, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the tensors that are needed, differentiable where grad mode is on."""
    *tensors, settings = problem
    acc = accumulation_dtype(problem.logits.dtype)

    def outputs(*tensors: Any) -> tuple[Tensor, ...]:
        results = by_torch(Problem._make([*tensors, settings]))
        values = (results.loss, results.lse, results.entropy)
        pairs = zip(values, upstream, strict=True)
        return tuple(value for value, grad in pairs if grad is not None)

    grads = tuple(grad.to(acc) for grad in upstream if grad is not None)
    return pull_back(outputs, tensors, needs, grads)


def pull_back(
    function: Callable[..., Any], tensors: Sequence[Any], needs: Sequence[bool], grads: Any
) -> list[Tensor | None]:
    """Return the gradients of the needed tensors: the vjp of ``function(*tensors)``."""
    variables = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]

    def of_variables(*variables: Tensor) -> Any:
        given = iter(variables)
        return function(
            *(next(given) if needed else x for x, needed in zip(tensors, needs, strict=True))
        )

    _, vjp = torch.func.vjp(of_variables, *variables)  # type: ignore[misc]
    found = iter(vjp(grads))
    return [next(found) if needed else None for needed in needs]


def target_gradient(problem: Problem, saved: Saved, grad_loss: Tensor) -> Tensor:
    """Return the gradient of probabilities: minus the weighted log-probabilities.

    Needs fewer passes than :func:`gradients`. Not for the focal loss.
    """
    logits, target, weight, token_weight, _, settings = problem
    dim, options = settings.dim, settings.of_operators
    row_max, log_sum, *_ = saved.state
    smoothing = options.get("label_smoothing", 0.0)
    scale = grad_loss.to(row_max.dtype) * (1 - smoothing)
    if settings.reduction == REDUCTIONS["mean"]:  # by 0 it is NaN, as the loss is
        scale = scale / saved.total_weight.masked_fill(saved.total_weight == 0, torch.nan)
    if token_weight is not None:
        scale = scale * token_weight
    scale = scale if scale.dim() == 0 else scale.unsqueeze(dim)
    seen = reference.transform(
        logits.to(row_max.dtype), options.get("softcap"), options.get("logit_scale", 1.0)
    )
    minus_log_prob = log_sum.unsqueeze(dim) - (seen - row_max.unsqueeze(dim))
    q = (1 - smoothing) * target + smoothing / target.shape[dim]
    if weight is not None:
        weight = weight.to(row_max.dtype).reshape([-1] + [1] * (logits.dim() - dim - 1))
        minus_log_prob, q = minus_log_prob * weight, q * weight
    minus_log_prob = minus_log_prob.masked_fill((q == 0) & seen.isneginf(), 0)  # as in the loss
    gradient: Tensor = minus_log_prob * scale
    if token_weight is not None:
        gradient = gradient.masked_fill((token_weight == 0).unsqueeze(dim), 0)
    return gradient.to(target.dtype)


def total_weight(problem: Problem) -> Tensor:
    """Return the divisor of the mean: the normalizer, or the sum of the weights of the rows."""
    logits, target, weight, token_weight, normalizer, settings = problem
    if normalizer is not None:
        return normalizer
    weights = logits.new_ones(row_shape(logits, settings.dim), dtype=torch.float64)
    if token_weight is not None:
        weights = weights * token_weight
    if not target.is_floating_point():
        target = target.to(torch.int64)  # a narrower dtype may not hold ignore_index
        left_out = (target == settings.ignore_index) | (weights == 0)
        if weight is not None:
            weights = weights * weight[target.clamp(0, weight.shape[0] - 1)]
        weights = weights.masked_fill(left_out, 0)
    return weights.sum()
