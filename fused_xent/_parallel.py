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

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import _autograd, _formulas, _ops, reference
from ._autograd import Grads
from ._options import REDUCTION_NAMES, REDUCTIONS, check_index, resolve
from ._problem import (
    Arguments,
    Problem,
    Saved,
    Upstream,
    accumulation_dtype,
    check_dense,
    check_range,
    is_checked,
    prepare,
    row_shape,
)
from ._torch_private import below_autograd, has_values, is_under_torch_func
from .reference import CrossEntropyStatistics

NO_CLASS = -1  # in target_indices of a shard, whose classes are never negative


class Shard(NamedTuple):
    """The classes of this rank are [start, start + logits.size(dim)) of n_classes."""

    group: dist.ProcessGroup
    start: int
    n_classes: int


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
    """Return the shard of an input with so many classes, and how many of these are no padding."""
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
    """Return the loss, or all statistics, of what the Function returns."""
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


# ---- what a rank knows ---------------------------------------------------------------------------


class Local(NamedTuple):
    """The problem of a shard, in which a row's labels are those on the shard's own classes."""

    problem: Problem  # class indices have become sparse labels
    kept: Tensor  # rows that count
    is_bad: Tensor | None  # rows with a class out of range: on GPUs, where this is not checked
    label: float  # of a class index


def local_problem(problem: Problem, shard: Shard) -> Local:
    """Return the problem of a shard.

    Smoothing gives each class an equal part: the shard's classes have ``own`` of it. What else the
    labels keep differs by a factor, which the labels are multiplied by: in the accumulation dtype,
    since 16-bit labels would be rounded again.
    """
    logits, target, _, token_weight, _, target_indices, settings = problem
    dim, options = settings.dim, dict(settings.of_operators)
    acc = accumulation_dtype(logits.dtype)
    smoothing = options.pop("label_smoothing", 0.0)
    own = smoothing * logits.shape[dim] / shard.n_classes
    factor = 1.0 if own == 1 else (1 - smoothing) / (1 - own)
    options["ignore_index"] = NO_CLASS
    if own:
        options["label_smoothing"] = own
    kept = None if token_weight is None else token_weight != 0
    is_bad = None
    if target_indices is not None or not target.is_floating_point():
        classes = (target.unsqueeze(dim) if target_indices is None else target_indices).long()
        is_label = classes != settings.ignore_index
        if kept is not None:
            is_label &= kept.unsqueeze(dim)
        if not is_checked(classes):
            is_bad = (is_label & ((classes < 0) | (classes >= shard.n_classes))).any(dim)
        if target_indices is None:
            kept = is_label.squeeze(dim)
            target = logits.new_ones((), dtype=acc).expand(classes.shape)
        classes = classes - shard.start
        is_own = is_label & (classes >= 0) & (classes < logits.shape[dim])
        target, target_indices = target.to(acc), torch.where(is_own, classes, NO_CLASS)
    if kept is None:
        kept = logits.new_ones(row_shape(logits, dim), dtype=torch.bool)
    own_settings = settings._replace(of_operators=options, ignore_index=NO_CLASS)
    of_shard = problem._replace(
        target=target if factor == 1 else target.to(acc) * factor,
        token_weight=_product(token_weight, kept, acc),
        normalizer=None,
        target_indices=target_indices,
        settings=own_settings,
    )
    return Local(of_shard, kept, is_bad, factor)


def _product(token_weight: Tensor | None, kept: Tensor, acc: torch.dtype) -> Tensor:
    """Return the weight of each row, 0 for rows that do not count."""
    return kept.to(acc) if token_weight is None else token_weight.masked_fill(~kept, 0)


def label_sums(problem: Problem) -> Tensor:
    """Return the sum of each row's sparse labels times their class weights."""
    labels: Any
    _, labels, weight, _, _, classes, settings = problem
    labels = labels.masked_fill(classes == NO_CLASS, 0)
    if weight is not None and weight.numel() > 0:
        labels = labels * weight.to(labels.dtype)[classes.clamp(min=0)]  # type: ignore[union-attr]
    sums: Any = labels.sum(settings.dim)
    return sums  # type: ignore[no-any-return]


def _own_rows(problem: Problem, local: Local) -> dict[str, Tensor]:
    """Return the rows of this shard: what is sent."""
    own, acc = local.problem, accumulation_dtype(problem.logits.dtype)
    logits, dim, options = own.logits, own.settings.dim, own.settings.of_operators
    n_classes = logits.shape[dim]
    if n_classes == 0:
        zeros = logits.new_zeros(row_shape(logits, dim), dtype=acc)
        rows = {"max": zeros - torch.inf, "log_sum": zeros, "part": zeros}
        if own.target_indices is None:
            rows["label_mass"] = zeros
        statistics: Any = [zeros, zeros, zeros.long()]
    else:
        of_all = ("lse_square_scale", "focal_gamma")  # these need the whole cross-entropy
        settings = own.settings._replace(
            reduction=REDUCTIONS["none"],
            loss_dtype=acc,
            of_operators={name: value for name, value in options.items() if name not in of_all},
        )
        unweighted = own._replace(token_weight=local.kept.to(acc), settings=settings)
        with nullcontext() if is_compiling() else below_autograd():
            part, _, state, *statistics = _ops.forward(unweighted)
        # If all logits of the shard are -inf, so is its lse, and part is NaN: the rise of the lse
        # makes the loss inf.
        part = part.masked_fill(state[1].isneginf(), 0)
        rows = {"max": state[0], "log_sum": state[1], "part": part}
        if own.target_indices is None:
            rows["label_mass"] = state[2]
    if own.settings.statistics:
        rows["entropy"], rows["argmax"] = statistics[1], statistics[2]
    return rows


def _mass(own: Problem) -> Tensor:
    """Return the sum of q over the shard's classes, of sparse labels."""
    smoothing: float = own.settings.of_operators.get("label_smoothing", 0.0)
    sums = label_sums(own)
    if not smoothing:
        return sums
    n_classes = own.logits.shape[own.settings.dim]
    if n_classes == 0:
        return sums
    total = n_classes if own.weight is None else own.weight.sum(dtype=torch.float64)
    of_smoothing = smoothing / n_classes * total
    return ((1 - smoothing) * sums + of_smoothing).to(sums.dtype)  # a scalar becomes float64


def _sent(problem: Problem, local: Local, start: int) -> dict[str, Tensor]:
    """Return what is sent of each row."""
    rows = _own_rows(problem, local)
    settings, is_index = problem.settings, has_indices(problem)
    if is_index and problem.weight is None and "label_smoothing" not in settings.of_operators:
        # The mass is 0 or 1, and no part is negative: a negative part says that the mass is 0.
        own_class: Any = local.problem.target_indices
        is_elsewhere = (own_class == NO_CLASS).squeeze(settings.dim)
        rows["part"] = rows["part"].masked_fill(is_elsewhere, -1)
    elif local.problem.target_indices is not None:
        rows["label_mass"] = _mass(local.problem)
    is_mean = settings.reduction == REDUCTIONS["mean"] and problem.normalizer is None
    if is_index and is_mean and problem.weight is not None:
        own = local.problem
        rows["class_weight"] = label_sums(own._replace(target=torch.ones_like(own.target)))
    if settings.statistics:
        rows["argmax"] = _as_float(rows["argmax"] + start, rows["max"].dtype)
        if not is_index and problem.target_indices is None:
            rows["top_label"], top_class = _top_label(problem)
            rows["top_class"] = _as_float(top_class + start, rows["max"].dtype)
    return rows


def has_indices(problem: Problem) -> bool:
    """Return True if the target holds class indices."""
    return not problem.target.is_floating_point()


def _top_label(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the greatest of each row's probabilities on this shard, and its class."""
    target, dim = problem.target, problem.settings.dim
    acc = accumulation_dtype(problem.logits.dtype)
    if target.shape[dim] == 0:
        none = target.new_full(row_shape(target, dim), -torch.inf, dtype=acc)
        return none, torch.zeros_like(none, dtype=torch.int64)
    top, classes = target.detach().max(dim)
    return top.to(acc), classes


def _as_float(classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bits of integers as floating-point numbers: what is sent has one dtype."""
    return classes.to(torch.int32 if dtype == torch.float32 else torch.int64).view(dtype)


def _as_classes(values: Tensor) -> Tensor:
    """Undo ``_as_float``."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64).long()


def gather(rows: dict[str, Tensor], shard: Shard, n_own: int) -> dict[str, Tensor]:
    """Return what all ranks have sent, each (n_ranks, numel): the only communication.

    Every rank sends the range of its classes too, so that wrong ranges are found: here, or on GPUs,
    where the host would have to wait, by the kernel, which then returns NaN.
    """
    ends = [rows["max"].new_full((1,), end) for end in (shard.start, shard.start + n_own)]
    packed = torch.cat([*(row.flatten() for row in rows.values()), *ends])
    found = all_gather(packed, shard.group)
    parts = found.split([*(row.numel() for row in rows.values()), 1, 1], 1)
    if found.is_cpu and has_values(found):
        _check_ranges(found[:, -2:], shard.n_classes)
        return dict(zip(rows, parts, strict=False))
    return dict(zip([*rows, "first_class", "end_class"], parts, strict=True))


def all_gather(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors of all ranks, (n_ranks, ...)."""
    n_ranks = dist.get_world_size(group)
    found = packed.new_empty(n_ranks * len(packed))
    collective("all_gather")(found, packed, group)
    return found.view(n_ranks, -1)


def collective(name: str) -> Any:
    """Return ``all_gather`` or ``reduce_scatter`` of one tensor, which torch 2.13 has renamed."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{name}_single", None) or getattr(dist, older[name])


def _check_ranges(ranges: Tensor, n_classes: int) -> None:
    """Check that the shards are all classes, in the order of the ranks."""
    last = 0.0
    is_right = True
    rounded = torch.tensor(n_classes, dtype=ranges.dtype).item()  # float32 from 2^24 on
    for start, end in ranges.tolist():
        is_right = is_right and start in (last, end)
        last = max(last, end)
    if not is_right or last != rounded:
        found = ", ".join(f"[{start:.0f}, {end:.0f})" for start, end in ranges.tolist())
        raise ValueError(
            f"the ranks' shards must be [0, {n_classes}) in the order of the ranks, got {found}: "
            "give each rank its vocab_start, and num_classes to all; call with the same rows, "
            "dtype and options on all ranks"
        )


# ---- what all ranks know -------------------------------------------------------------------------


def _total_weight(problem: Problem, local: Local, rows: dict[str, Tensor]) -> Tensor:
    """Return the divisor of the mean."""
    if problem.normalizer is not None:
        return problem.normalizer
    weights: Any = local.problem.token_weight
    if "class_weight" in rows:
        weights = weights * rows["class_weight"].sum(0).view(weights.shape)
    return weights.sum(dtype=torch.float64)  # type: ignore[no-any-return]


class Rows(NamedTuple):
    """The results of each row, and what its gradient needs. All ranks have the same bits."""

    losses: Tensor
    saved: Saved
    others: Tensor  # what the mass of the other shards' labels adds to the gradient of the lse
    statistics: tuple[Tensor, ...]  # lse, entropy, argmax and, for probabilities, the top label


def exchange(problem: Problem, local: Local, shard: Shard) -> Rows:
    """Send this shard's rows to all ranks, and return what the rows of all make."""
    settings = problem.settings
    n_own = problem.logits.shape[settings.dim]
    rows = gather(_sent(problem, local, shard.start), shard, n_own)
    shape, options = row_shape(problem.logits, settings.dim), settings.of_operators
    token_weight: Any = local.problem.token_weight  # never None here
    added = _ops.add_up_shards(
        rows,
        shard.n_classes,
        dist.get_rank(shard.group),
        token_weight.flatten(),
        None if local.is_bad is None else local.is_bad.flatten(),
        keeps_mass=local.problem.target_indices is None,
        lse_square_scale=options.get("lse_square_scale", 0.0),
        focal_gamma=options.get("focal_gamma", 0.0),
    )
    losses, others = added.loss.view(shape), added.other_mass.view(shape)
    total, state = _total_weight(problem, local, rows), added.state.view(len(added.state), *shape)
    if not settings.statistics:
        return Rows(losses, Saved(total, state, None), others, ())
    entropy = added.entropy.view(shape)
    statistics = [added.lse.view(shape), entropy, added.argmax.view(shape)]
    if "top_label" in rows:
        statistics.append(_label_of_all(rows).view(shape))
    return Rows(losses, Saved(total, state, entropy), others, tuple(statistics))


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
        ctx.label, ctx.settings = local.label, local.problem.settings
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
                grad_target = ctx.label * _formulas.target_gradient(problem, saved, grad_loss)
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
        total = saved.total_weight
        g = g / total.masked_fill(total == 0, torch.nan).to(g.dtype)
    of_others = (g * others).masked_fill(others == 0, 0)
    return upstream._replace(lse=of_others if grad_lse is None else grad_lse + of_others)


def _label_of_all(rows: dict[str, Tensor]) -> Tensor:
    """Return the class of each row's greatest probability: of equal ones the first."""
    rank = rows["top_label"].argmax(0, keepdim=True)
    return _as_classes(rows["top_class"]).gather(0, rank).squeeze(0)
