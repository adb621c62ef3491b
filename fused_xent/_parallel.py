"""Losses of a vocabulary that is split over processes: each rank has a range of the classes.

A rank computes the loss of its own classes, its shard. One all-gather then sends a few numbers of
each row: the maximum and the log_sum of the shard's logits, and the shard's part of the
cross-entropy, ``sum(q * (lse - z))`` over its classes with the lse of its classes alone. With ``Q``
the sum of a shard's ``q``, the cross-entropy is the sum over the shards of
``part + Q * (lse of all - lse of the shard)``. Every rank adds them up in the order of the ranks,
so that all have the same bits. The backward needs no communication: the kernels take the maximum
and the log_sum of all shards for those of the row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import _autograd, _formulas, _ops, reference
from ._autograd import Grads
from ._options import REDUCTION_NAMES, REDUCTIONS, check_index, resolve
from ._overwriting import check_overwritable
from ._parallel_rows import Shard, exchange, local_problem
from ._problem import Arguments, Problem, Saved, Upstream, check_dense, check_range, prepare
from ._torch_private import is_under_torch_func
from .reference import CrossEntropyStatistics


def evaluate(
    tensors: Arguments,
    statistics: bool,
    options: dict[str, Any],
    process_group: dist.ProcessGroup | None,
    vocab_start: int | None,
    num_classes: int | None,
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Check the arguments and return the loss, or all statistics. The input is a shard."""
    input, target, weight, token_weight, normalizer, target_indices = tensors
    check_dense("input", input)
    settings = resolve(input.dim(), statistics, options)
    if settings.grad_in_forward:  # the gradient needs the maximum and sum of all ranks
        options = {**options, "grad_in_forward": False, "inplace_backward": True}
    dim = settings.dim
    shard, n_own = shard_of(input.shape[dim], process_group, vocab_start, num_classes)
    if n_own < input.shape[dim]:  # the others are padding: they have probability and gradient 0
        is_dense = target_indices is None and isinstance(target, Tensor)
        if is_dense and target.shape == input.shape:
            target = target.narrow(dim, 0, n_own)
        if isinstance(weight, Tensor) and weight.shape == input.shape[dim : dim + 1]:
            weight = weight[:n_own]
        input = input.narrow(dim, 0, n_own)
    tensors = (input, target, weight, token_weight, normalizer, target_indices)
    return of_shard(prepare(*tensors, statistics, options), shard)


def shard_of(
    n_classes: int,
    process_group: dist.ProcessGroup | None,
    vocab_start: int | None,
    num_classes: int | None,
) -> tuple[Shard, int]:
    """Return the shard of an input with so many classes, and how many of these are not padding."""
    if process_group is None:
        name = "num_classes" if vocab_start is None else "vocab_start"
        value = num_classes if vocab_start is None else vocab_start
        raise ValueError(f"{name} must be None without a process_group, got {value}")
    check_group(process_group)
    rank, n_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    if vocab_start is None:
        start = rank * n_classes
        total = (
            n_ranks * n_classes if num_classes is None else check_index("num_classes", num_classes)
        )
    else:
        if num_classes is None:
            raise ValueError(
                "num_classes must be given with vocab_start: the number of classes of all ranks"
            )
        start = check_index("vocab_start", vocab_start)
        total = check_index("num_classes", num_classes)
    if start < 0:
        raise ValueError(f"vocab_start must not be negative, got {start}")
    if total < 1:
        raise ValueError(f"num_classes must be at least 1, got {total}")
    start = min(start, total)
    return Shard(process_group, start, total), min(total - start, n_classes)


def check_group(process_group: dist.ProcessGroup) -> None:
    """Check that this is a group of processes which this process belongs to."""
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a ProcessGroup that this process belongs to, got "
            f"{type(process_group).__name__}"
        )


def of_shard(problem: Problem, shard: Shard) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics, of a problem whose logits are this rank's shard."""
    check_overwritable(problem)
    check_supported(problem.logits)
    check_gradients(problem)
    check_range(problem, shard.n_classes)
    return complete(problem, VocabularyParallel.apply(*problem, shard), shard)


def check_supported(logits: Tensor) -> None:
    """Check that the kernels can compute a shard."""
    if not _ops.has_kernels(logits):
        raise RuntimeError(
            "process_group must be None without native kernels for input's device: "
            "`python -m fused_xent` says why there are none"
        )
    if not is_compiling() and is_under_torch_func():
        raise RuntimeError("process_group must be None under the transforms of torch.func")


def complete(
    problem: Problem, results: tuple[Any, ...], shard: Shard
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics, from the results of the Function."""
    if not problem.settings.statistics:
        return (results[0],)
    loss, lse, entropy, argmax, *top_label = results
    label = top_label[0] if top_label else None
    if problem.target_indices is not None:
        label = _formulas.top_label(problem, shard.n_classes)
    return _autograd.complete(problem, loss, lse, entropy, argmax, label)


def check_gradients(problem: Problem) -> None:
    """Check that no gradient is wanted that would need more communication."""
    wanted: dict[str, Tensor | None] = {
        "weight": problem.weight,
        "token_weight": problem.token_weight,
        "normalizer": problem.normalizer,
    }
    if problem.target_indices is not None:
        wanted["target"] = problem.target
    for name, tensor in wanted.items():
        if _autograd.needs_graph(tensor):
            raise RuntimeError(
                f"{name} must not require a gradient with process_group, got one that does: detach "
                "it. Only logits and probabilities that are sharded as they are have one"
            )


def check_first_derivative() -> None:
    """Check that the backward that runs is not recorded for another one."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "process_group must be None for create_graph=True and for torch.func: a second "
            "derivative would need more communication"
        )


# ---- autograd ------------------------------------------------------------------------------------


class VocabularyParallel(torch.autograd.Function):
    """The loss of all shards; the gradient of this rank's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return loss, and with statistics lse, entropy, argmax and the class of the top label.

        The inputs are a Problem's, and the Shard.
        """
        *of_problem, shard = inputs
        problem = Problem._make(of_problem)
        settings, local = problem.settings, local_problem(problem, shard)
        losses, saved, others, statistics = exchange(problem, local, shard)
        loss = reference.reduce(losses, REDUCTION_NAMES[settings.reduction], saved.total_weight)
        ctx.set_materialize_grads(False)
        ctx.factor, ctx.settings = local.factor, local.problem.settings
        ctx.save_for_backward(*local.problem[:-1], *saved, others)
        ctx.mark_non_differentiable(*statistics[2:])
        loss = loss.to(settings.loss_dtype or problem.logits.dtype)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> Grads:
        """Return the gradients of the logits and, if they are sharded too, of probabilities."""
        check_first_derivative()
        upstream = Upstream(grad_loss, *(grads[:2] or (None, None)))
        none = (None,) * (len(Problem._fields) + 1)
        if all(grad is None for grad in upstream):
            return none
        *tensors, total, state, entropy, others = ctx.saved_tensors
        problem = Problem._make([*tensors, ctx.settings])
        saved, is_empty = Saved(total, state, entropy), problem.logits.shape[ctx.settings.dim] == 0
        grad_target = grad_logits = None
        if ctx.needs_input_grad[1] and grad_loss is not None:
            if is_empty:
                grad_target = torch.zeros_like(problem.target)
            else:
                grad_target = ctx.factor * _formulas.target_gradient(problem, saved, grad_loss)
        if ctx.needs_input_grad[0]:
            grad_logits = logits_gradient(problem, saved, upstream, others)
        return grad_logits, grad_target, *none[2:]


def logits_gradient(problem: Problem, saved: Saved, upstream: Upstream, others: Tensor) -> Tensor:
    """Return the gradient of a shard's logits. ``others`` is that of ``Rows``."""
    if problem.logits.shape[problem.settings.dim] == 0:
        return torch.zeros_like(problem.logits)
    upstream = _upstream_of(problem, saved, upstream, others)
    if is_compiling():
        return _ops.backward(problem, saved, upstream)
    return _autograd.logits_gradient(problem, saved, upstream)


def write_gradient_(problem: Problem, saved: Saved, upstream: Upstream, others: Tensor) -> None:
    """Write the gradient of a shard's logits over them."""
    if problem.logits.numel():
        _ops.backward_(problem, saved, _upstream_of(problem, saved, upstream, others))


def _upstream_of(problem: Problem, saved: Saved, upstream: Upstream, others: Tensor) -> Upstream:
    """Return the upstream gradients of a shard.

    The kernels multiply the probabilities by the mass of the shard's labels. What the labels of
    other shards add is a gradient of the lse.
    """
    if upstream.loss is None:
        return upstream
    g, grad_lse = upstream.loss.to(others.dtype), upstream.lse
    if problem.settings.reduction == REDUCTIONS["mean"]:
        g = reference.divided(g, saved.total_weight).to(g.dtype)
    of_others = (g * others).masked_fill(others == 0, 0)
    return upstream._replace(lse=of_others if grad_lse is None else grad_lse + of_others)
