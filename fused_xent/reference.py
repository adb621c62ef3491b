"""A readable reference of what the kernels compute, in differentiable torch operations.

Tests and the benchmark compare with it in float64. It also computes the loss on devices without
kernels, and gradients of gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

PADDING = -100  # in an index of selected classes


class _Statistics(NamedTuple):
    loss: Tensor  # as of cross_entropy
    lse: Tensor  # log of the sum of exp over the classes; differentiable
    z_loss: Tensor  # lse_square_scale * lse^2, times the token's weight: its part of the loss
    entropy: Tensor  # of the softmax, in nats; differentiable
    argmax: Tensor  # int64: the first of the greatest logits, NaN above all
    correct: Tensor  # bool: whether argmax is the target, or the argmax of the probabilities


class SparseClasses(NamedTuple):
    """The classes of sparse labels, all of one shape."""

    classes: Tensor  # int64; 0 where the index is no class
    is_class: Tensor
    is_padding: Tensor


class CrossEntropyStatistics(_Statistics):
    """``(loss, lse, z_loss, entropy, argmax, correct)``: all but the loss have a value per row.

    ``fused_xent.cross_entropy_with_statistics`` returns it, and describes the fields.
    """

    __slots__ = ()

    def __new__(cls, loss: Any, *rows: Tensor) -> Self:
        """Take the fields, or one iterable of them, as torch makes tuples of tensor subclasses."""
        return super().__new__(cls, *((loss, *rows) if rows else loss))


class _Selected(NamedTuple):
    log_probs: Tensor  # of the selected classes; differentiable
    entropy: Tensor  # of the softmax, in nats, a row each; differentiable


class SelectedLogProbs(_Selected):
    """``(log_probs, entropy)``, which ``fused_xent.selective_log_softmax`` describes.

    It is what the functions of log-probabilities return with ``with_entropy=True``.
    """

    __slots__ = ()

    def __new__(cls, log_probs: Any, *entropy: Tensor) -> Self:
        """Take the fields, or one iterable of them: see ``CrossEntropyStatistics``."""
        return super().__new__(cls, *((log_probs, *entropy) if entropy else log_probs))


def class_dim(input: Tensor) -> int:
    """Return the dimension of the classes by torch's rule: 0 of (C,), 1 of (N, C, d1, ...)."""
    return 0 if input.dim() == 1 else 1


def transform(input: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Return the logits as the softmax sees them."""
    logits = input if logit_scale == 1 else input * logit_scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """Return log-probabilities that keep their digits as they approach 0.

    At most one class of a row has a probability above 1/2. Its log-probability is ``log1p(-rest)``,
    with the sum ``rest`` of the other probabilities. torch's rounds ``1 + rest``.
    """
    log_prob = logits.log_softmax(dim)
    if logits.shape[dim] == 0:
        return log_prob
    top = logits.detach().argmax(dim, keepdim=True)
    rest = log_prob.exp().scatter(dim, top, 0).sum(dim, keepdim=True)
    is_close = rest < 0.5
    exact = torch.log1p(-rest.masked_fill(~is_close, 0))
    return log_prob.scatter(dim, top, torch.where(is_close, exact, log_prob.gather(dim, top)))


def sparse_classes(target_indices: Tensor, n_classes: int, ignore_index: int) -> SparseClasses:
    """Return the classes of sparse labels, which can be gathered."""
    index = target_indices.to(torch.int64)  # a narrower dtype may not hold ignore_index
    is_class = (index >= 0) & (index < n_classes)
    return SparseClasses(index.masked_fill(~is_class, 0), is_class, index == ignore_index)


def dense_labels(
    target: Tensor, target_indices: Tensor, n_classes: int, dim: int, ignore_index: int
) -> Tensor:
    """Return labels of all classes: the sparse ones of each class added up, and 0 elsewhere.

    An index that is no class makes a label NaN.
    """
    if n_classes == 0:
        return target.narrow(dim, 0, 0)
    classes, is_class, is_padding = sparse_classes(target_indices, n_classes, ignore_index)
    is_wrong = ~is_class & ~is_padding  # NaN at padding would make the gradient there NaN
    target = target * torch.ones_like(target).masked_fill(is_wrong, torch.nan)
    target = target.masked_fill(is_padding, 0)
    shape = [*target.shape[:dim], n_classes, *target.shape[dim + 1 :]]
    return target.new_zeros(shape).scatter_add(dim, classes, target)


def cross_entropy(input: Tensor, target: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Softmax cross-entropy, the first of ``cross_entropy_with_statistics``."""
    return cross_entropy_with_statistics(input, target, *arguments, **options).loss


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
) -> CrossEntropyStatistics:
    """Compute ``fused_xent.cross_entropy_with_statistics`` in the dtype of ``input``.

    With ``p`` the softmax, a row's cross-entropy is ``-sum(q * log(p))`` over the classes. For
    probabilities ``q = w * ((1 - label_smoothing) * target + label_smoothing / C)``; for a class
    index ``y``, ``q = (1 - label_smoothing) * w[y] * onehot(y) + label_smoothing / C * w``. Where
    ``q`` is 0 the term is 0, also at a logit of ``-inf``. With ``target_indices``, a class's
    probability is the sum of those in ``target`` that belong to it.
    """
    dim = class_dim(input) if dim is None else dim % input.dim()
    if token_weight is None:
        token_weight = input.new_ones(input.shape[:dim] + input.shape[dim + 1 :])
    kept = token_weight != 0
    if target_indices is not None:
        # Rows left out have padding only: an index that is no class would make gradients NaN.
        index = target_indices.to(torch.int64).masked_fill(~kept.unsqueeze(dim), ignore_index)
        target = dense_labels(target, index, input.shape[dim], dim, ignore_index)
    if not target.is_floating_point():
        target = target.to(torch.int64)  # a narrower dtype may not hold ignore_index
        kept = kept & (target != ignore_index)
    token_weight = token_weight.masked_fill(~kept, 0)
    # First, so that logits of rows left out have no effect, not even NaN.
    logits = input.masked_fill(~kept.unsqueeze(dim), 0)
    logits = transform(logits, softcap, logit_scale)
    log_prob = log_softmax(logits, dim)
    if weight is not None:
        weight = weight.reshape([-1] + [1] * (input.dim() - dim - 1))
    if target.is_floating_point():
        target = target.masked_fill(~kept.unsqueeze(dim), 0)
        labels = _probability_loss(log_prob, target, weight, label_smoothing, dim)
    else:
        labels = _index_loss(log_prob, target, kept, weight, label_smoothing, dim)
    row_loss, row_weight, mass = labels
    if focal_gamma != 0:
        row_loss = focal(row_loss, mass, focal_gamma)
    lse = (logits.logsumexp(dim) if input.shape[dim] else log_prob.sum(dim)).masked_fill(~kept, 0)
    z_loss = lse_square_scale * lse.square() * token_weight
    row_loss = (row_loss * token_weight).masked_fill(~kept, 0)
    if lse_square_scale != 0:
        row_loss = row_loss + z_loss
    total = (row_weight * token_weight).sum()
    return CrossEntropyStatistics(
        reduce(row_loss, reduction, total if normalizer is None else normalizer),
        lse,
        z_loss,
        -weighted_sum(log_prob.exp(), log_prob, dim).masked_fill(~kept, 0),
        *_predictions(logits, target, kept, dim),
    )


def reduce(row_loss: Tensor, reduction: str, normalizer: Tensor | float | None) -> Tensor:
    """Return the loss of all rows. Only ``"mean"`` needs a normalizer."""
    if reduction == "none":
        return row_loss
    return divided(row_loss.sum(), normalizer) if reduction == "mean" else row_loss.sum()


def divided(total: Tensor, normalizer: Any) -> Tensor:
    """Return the quotient of a mean, or of its gradient. Divided by 0, it is NaN, not infinite."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.masked_fill(normalizer == 0, torch.nan)
    return total / normalizer  # type: ignore[no-any-return]


def _predictions(logits: Tensor, target: Tensor, kept: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if logits.shape[dim] == 0:
        return torch.full_like(kept, -1, dtype=torch.int64), torch.zeros_like(kept)
    argmax = logits.detach().argmax(dim)
    label = target.argmax(dim) if target.is_floating_point() else target
    return argmax.masked_fill(~kept, -1), (argmax == label) & kept


def weighted_sum(q: Tensor, log_prob: Tensor, dim: int) -> Tensor:
    """Sum ``q * log_prob`` over the classes, with 0 * (-inf) = 0."""
    return (q * log_prob.masked_fill((q == 0) & log_prob.isneginf(), 0)).sum(dim)


def focal(cross_entropy: Tensor, mass: Tensor, gamma: float) -> Tensor:
    """Return ``(1 - P)^gamma * cross_entropy`` with ``P = exp(-cross_entropy / mass)``."""
    zero, infinite = cross_entropy == 0, cross_entropy.isposinf()
    at_limit = zero | infinite  # the power may have no derivative there
    minus_log_p = cross_entropy.masked_fill(at_limit, 1) / mass.masked_fill(at_limit, 1)
    power = ((-torch.expm1(-minus_log_p)) ** gamma).masked_fill(infinite, 1)
    return (power * cross_entropy).masked_fill(zero, 0)


def _probability_loss(
    log_prob: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_classes = log_prob.shape[dim]
    q = target
    if label_smoothing > 0:
        q = q * (1 - label_smoothing) + label_smoothing / max(n_classes, 1)
    if weight is not None:
        q = q * weight
    row_loss = -weighted_sum(q, log_prob, dim)
    has_weight = 1.0 if n_classes else 0.0  # torch's mean divides by the elements over the classes
    return row_loss, torch.full_like(row_loss, has_weight), q.sum(dim)


def _index_loss(
    log_prob: Tensor,
    target: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n_classes = log_prob.shape[dim]
    is_class = (target >= 0) & (target < n_classes)
    index = target.masked_fill(~(kept & is_class), 0).unsqueeze(dim)
    if weight is None:
        weight = log_prob.new_ones([1] * (log_prob.dim() - dim))
    class_weight = weight.expand_as(log_prob)
    if n_classes == 0:  # every row is ignored, and there is no class 0 to gather
        zeros = log_prob.sum(dim)
        return zeros, zeros, zeros
    target_weight = class_weight.gather(dim, index)
    q = (1 - label_smoothing) * target_weight
    row_loss, mass = -weighted_sum(q, log_prob.gather(dim, index), dim), q.squeeze(dim)
    if label_smoothing > 0:
        smooth_loss = -weighted_sum(class_weight, log_prob, dim)
        row_loss = row_loss + label_smoothing / n_classes * smooth_loss
        mass = mass + label_smoothing / n_classes * class_weight.sum(dim)
    # A target that is no class makes the row's loss and gradient NaN.
    row_loss = row_loss * torch.where(is_class | ~kept, 1.0, torch.nan)
    return row_loss, target_weight.squeeze(dim), mass


def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = PADDING,
) -> SelectedLogProbs:
    """Compute ``fused_xent.selective_log_softmax``, and the entropy, in the dtype of ``input``.

    ``index`` has ``K`` classes a row in dimension ``dim``.
    """
    dim = dim % input.dim()
    index = index.to(torch.int64)
    padding = index == ignore_index
    left_out = padding.all(dim, keepdim=True)
    logits = transform(input.masked_fill(left_out, 0), softcap, logit_scale)
    log_prob = log_softmax(logits, dim)
    is_class = (index >= 0) & (index < input.shape[dim])
    if input.shape[dim]:
        log_probs = log_prob.gather(dim, index.masked_fill(~is_class, 0))
    else:  # there is no class 0 to gather
        log_probs = log_prob.sum(dim, keepdim=True).expand(index.shape)
    # An index that is no class makes the log-probabilities and the gradient of its row NaN.
    is_wrong = (~is_class & ~padding).any(dim, keepdim=True)
    log_probs = log_probs.masked_fill(padding, 0) * torch.where(is_wrong, torch.nan, 1.0)
    prob = log_prob.exp()
    entropy = -weighted_sum(prob, log_prob, dim)
    return SelectedLogProbs(log_probs, entropy.masked_fill(left_out.squeeze(dim), 0))
