"""What each rank of a split vocabulary computes and sends, and how all ranks' rows are combined.

``_parallel`` explains it, and computes losses from it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import _ops
from ._options import REDUCTIONS
from ._problem import Problem, Saved, accumulation_dtype, is_checked, row_shape
from ._torch_private import below_autograd, has_values

NO_CLASS = -1  # in target_indices of a shard, whose classes are never negative


class Shard(NamedTuple):
    """The classes of this rank are [start, start + logits.size(dim)) of n_classes."""

    group: dist.ProcessGroup
    start: int
    n_classes: int


# ---- what a rank knows ---------------------------------------------------------------------------


class Local(NamedTuple):
    """The problem of a shard, in which a row's labels are those on the shard's own classes."""

    problem: Problem  # class indices have become sparse labels
    kept: Tensor  # rows that count
    is_bad: Tensor | None  # rows with a class out of range: on GPUs, where this is not checked
    factor: float  # that the labels have been multiplied by


def local_problem(problem: Problem, shard: Shard) -> Local:
    """Return the problem of a shard.

    The kernels spread smoothing over the classes that they see, so a shard is smoothed by ``own``,
    its share of the smoothing. They then multiply labels by ``1 - own``, not ``1 - smoothing``: the
    factor corrects that. It is applied in the accumulation dtype, to round 16-bit labels only once.
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
    weights = kept.to(acc) if token_weight is None else token_weight.masked_fill(~kept, 0)
    own_settings = settings._replace(of_operators=options, ignore_index=NO_CLASS)
    of_shard = problem._replace(
        target=target if factor == 1 else target.to(acc) * factor,
        token_weight=weights,
        normalizer=None,
        target_indices=target_indices,
        settings=own_settings,
    )
    return Local(of_shard, kept, is_bad, factor)


def label_sums(problem: Problem) -> Tensor:
    """Return the sum of each row's sparse labels times their class weights."""
    labels: Any
    _, labels, weight, _, _, classes, settings = problem
    labels = labels.masked_fill(classes == NO_CLASS, 0)
    if weight is not None and weight.numel() > 0:
        labels = labels * weight.to(labels.dtype)[classes.clamp(min=0)]  # type: ignore[union-attr]
    sums: Any = labels.sum(settings.dim)
    return sums  # type: ignore[no-any-return]


def class_weights(problem: Problem) -> Tensor:
    """Return the class weight of each row's class; 0 where another rank has the class."""
    return label_sums(problem._replace(target=torch.ones_like(problem.target)))


def _own_rows(problem: Problem, local: Local) -> dict[str, Tensor]:
    """Return the numbers of each row that come from the kernels."""
    own, acc = local.problem, accumulation_dtype(problem.logits.dtype)
    logits, dim, options = own.logits, own.settings.dim, own.settings.of_operators
    if logits.shape[dim] == 0:
        part = logits.new_zeros(row_shape(logits, dim), dtype=acc)
        state: Any = (part - torch.inf, part, part)
        statistics: Any = [part, part, part.long()]
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
    """Return the sum of q over the shard's classes, where labels are sparse."""
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
        rows["class_weight"] = class_weights(local.problem)
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


# ---- communication -------------------------------------------------------------------------------


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
    """Send this shard's rows to all ranks, and combine the rows of all ranks."""
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


def _label_of_all(rows: dict[str, Tensor]) -> Tensor:
    """Return the class of each row's greatest probability: of equal ones the first."""
    rank = rows["top_label"].argmax(0, keepdim=True)
    return _as_classes(rows["top_class"]).gather(0, rank).squeeze(0)
