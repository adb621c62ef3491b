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
    logits, target, weight, token_weight, normalizer, target_indices = (
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
        target_indices=target_indices,
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

    Needs fewer passes than ``gradients``, and for sparse labels no memory of the logits' size.
    Not for the focal loss.
    """
    logits, target, weight, token_weight, _, target_indices, settings = problem
    dim, options = settings.dim, settings.of_operators
    n_classes = logits.shape[dim]
    row_max, log_sum, *_ = saved.state
    smoothing = options.get("label_smoothing", 0.0)
    scale = grad_loss.to(row_max.dtype) * (1 - smoothing)
    if settings.reduction == REDUCTIONS["mean"]:
        scale = reference.divided(scale, saved.total_weight)
    if token_weight is not None:
        scale = scale * token_weight
    scale = scale if scale.dim() == 0 else scale.unsqueeze(dim)
    if target_indices is not None:
        sparse = reference.sparse_classes(target_indices, n_classes, settings.ignore_index)
        logits = logits.gather(dim, sparse.classes)
        weight = None if weight is None else weight[sparse.classes]
    elif weight is not None:
        weight = weight.reshape([-1] + [1] * (logits.dim() - dim - 1))
    seen = reference.transform(
        logits.to(row_max.dtype), options.get("softcap"), options.get("logit_scale", 1.0)
    )
    minus_log_prob = log_sum.unsqueeze(dim) - (seen - row_max.unsqueeze(dim))
    q = (1 - smoothing) * target + smoothing / n_classes
    if weight is not None:
        weight = weight.to(row_max.dtype)
        minus_log_prob, q = minus_log_prob * weight, q * weight
    minus_log_prob = minus_log_prob.masked_fill((q == 0) & seen.isneginf(), 0)  # as in the loss
    gradient: Tensor = minus_log_prob * scale
    if target_indices is not None:
        gradient = gradient.masked_fill(~sparse.is_class, torch.nan)
        gradient = gradient.masked_fill(sparse.is_padding, 0)
    if token_weight is not None:
        gradient = gradient.masked_fill((token_weight == 0).unsqueeze(dim), 0)
    return gradient.to(target.dtype)


def focal_slope(cross_entropy: Tensor, mass: Tensor, gamma: float) -> Tensor:
    """Return the derivative of the focal loss by the cross-entropy."""
    zero, infinite = cross_entropy == 0, cross_entropy.isposinf()
    at_limit = zero | infinite
    minus_log_p = cross_entropy.masked_fill(at_limit, 1) / mass.masked_fill(at_limit, 1)
    one_minus_p = -torch.expm1(-minus_log_p)
    rise = gamma * torch.exp(-minus_log_p) * minus_log_p / one_minus_p
    return (one_minus_p**gamma * (1 + rise)).masked_fill(zero, 0).masked_fill(infinite, 1)


def top_label(problem: Problem, n_classes: int) -> Tensor:
    """Return each row's class with the greatest sparse label: the argmax of the dense labels.

    The labels of a class are added up in a fixed order, and the first of the greatest classes wins.
    All classes that have no label share the label 0: only the first of them can win, and that is
    one of the first K + 1 classes.
    """
    _, target, _, _, _, target_indices, settings = problem
    indices: Any = target_indices  # never None here
    dim = settings.dim
    classes, is_class, is_padding = reference.sparse_classes(
        indices, n_classes, settings.ignore_index
    )
    index = classes.masked_fill(~is_class | is_padding, n_classes).movedim(dim, -1)
    index, order = index.sort(dim=-1, stable=True)  # equal classes adjoin; no labels are last
    total = target.detach().double().movedim(dim, -1).gather(-1, order)
    step = 1
    while step < index.shape[-1]:  # each total is that of 2, 4, 8 ... labels of its class
        is_same = index[..., step:] == index[..., :-step]
        added = total[..., step:] + total[..., :-step].masked_fill(~is_same, 0)
        total, step = torch.cat([total[..., :step], added], -1), 2 * step
    is_class = index < n_classes
    is_new = torch.ones_like(is_class[..., :1])
    differs = index[..., 1:] != index[..., :-1]
    is_last = torch.cat([differs, is_new], -1) & is_class
    is_first = torch.cat([is_new, differs], -1) & is_class
    top, place = total.masked_fill(~is_last, -torch.inf).max(-1)
    label = index.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    # If the sorted classes start with 0, 1 ... n - 1, then n is the first one without a label.
    other = (is_first & (index == is_first.cumsum(-1) - 1)).sum(-1)
    is_other = (other < n_classes) & ((top < 0) | ((top == 0) & (other < label)))
    return torch.where(is_other, other, label)


def total_weight(problem: Problem) -> Tensor:
    """Return the divisor of the mean: the normalizer, or the sum of the weights of the rows."""
    logits, target, weight, token_weight, normalizer, _, settings = problem
    if normalizer is not None:
        return normalizer
    if token_weight is None:
        token_weight = logits.new_ones(row_shape(logits, settings.dim))
    return sum_of_weights(target, weight, token_weight, settings.ignore_index)


def sum_of_weights(
    target: Tensor, weight: Tensor | None, token_weight: Tensor, ignore_index: int
) -> Tensor:
    """Return the sum of the rows' weights: of class indices, those of their classes count too."""
    weights = token_weight.double()
    if not target.is_floating_point():
        target = target.to(torch.int64)  # a narrower dtype may not hold ignore_index
        left_out = (target == ignore_index) | (weights == 0)
        if weight is not None and weight.numel() > 0:
            weights = weights * weight[target.clamp(0, weight.shape[0] - 1)]
        weights = weights.masked_fill(left_out, 0)
    return weights.sum()
