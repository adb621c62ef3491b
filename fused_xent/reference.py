"""What the kernels compute, written to be read: plain differentiable torch operations.

Tests and the benchmark compare with it in float64. It also serves where no kernel does: on devices
without native kernels, and for gradients of gradients.
"""

import torch
from torch import Tensor


def class_dim(input: Tensor) -> int:
    """Return the dimension of the classes by torch's rule: 0 of (C,), 1 of (N, C, d1, ...)."""
    return 0 if input.dim() == 1 else 1


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy in the dtype of ``input``; see :func:`fused_xent.cross_entropy`.

    With ``p = softmax(input)``, a row's loss is ``-sum(q * log(p))`` over the classes. For
    probabilities ``q = w * ((1 - label_smoothing) * target + label_smoothing / C)``; for a class
    index ``y``, ``q = (1 - label_smoothing) * w[y] * onehot(y) + label_smoothing / C * w``. Where
    ``q`` is 0 the term is 0, also at a logit of ``-inf``.
    """
    dim = class_dim(input)
    log_prob = input.log_softmax(dim)
    if weight is not None:
        weight = weight.reshape([-1] + [1] * (input.dim() - dim - 1))
    if target.is_floating_point():
        row_loss, row_weight = _probability_loss(log_prob, target, weight, label_smoothing, dim)
    else:
        row_loss, row_weight = _index_loss(
            log_prob, target, weight, ignore_index, label_smoothing, dim
        )
    if reduction == "none":
        return row_loss
    return row_loss.sum() / row_weight.sum() if reduction == "mean" else row_loss.sum()


def _weighted_sum(q: Tensor, log_prob: Tensor, dim: int) -> Tensor:
    """Sum ``q * log_prob`` over the classes, with 0 * (-inf) = 0."""
    return (q * log_prob.masked_fill((q == 0) & log_prob.isneginf(), 0)).sum(dim)


def _probability_loss(log_prob, target, weight, label_smoothing, dim):
    n_classes = log_prob.shape[dim]
    q = target
    if label_smoothing > 0:
        q = q * (1 - label_smoothing) + label_smoothing / n_classes
    if weight is not None:
        q = q * weight
    row_loss = -_weighted_sum(q, log_prob, dim)
    return row_loss, torch.ones_like(row_loss)


def _index_loss(log_prob, target, weight, ignore_index, label_smoothing, dim):
    kept = target != ignore_index
    index = target.to(torch.int64).masked_fill(~kept, 0).unsqueeze(dim)
    if weight is None:
        weight = log_prob.new_ones([1] * (log_prob.dim() - dim))
    class_weight = weight.expand_as(log_prob)
    if log_prob.shape[dim] == 0:  # every row is ignored, and there is no class 0 to gather
        return log_prob.sum(dim), kept.to(log_prob.dtype)
    target_weight = class_weight.gather(dim, index)
    row_loss = -(1 - label_smoothing) * _weighted_sum(
        target_weight, log_prob.gather(dim, index), dim
    )
    if label_smoothing > 0:
        smooth_loss = -_weighted_sum(class_weight, log_prob, dim)
        row_loss = row_loss + label_smoothing / log_prob.shape[dim] * smooth_loss
    return row_loss.masked_fill(~kept, 0), target_weight.squeeze(dim).masked_fill(~kept, 0)
