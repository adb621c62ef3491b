"""The operators as torch operations, for backends without fused_xent's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _formulas, _linear, _ops, _selected, reference
from ._linear import Inputs
from ._linear_autograd import Layer
from ._meta import AddedUp, state_size
from ._options import REDUCTIONS
from ._problem import Problem, Upstream, accumulation_dtype, row_shape
from ._selected import LinearInputs


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a table for ``torch.export.ExportedProgram.run_decompositions``.

    Add it to torch's own: ``torch.export.default_decompositions() | fused_xent.decompositions()``.
    Then no operator of fused_xent is left in the program, and ONNX and other backends can run it:
    ``torch.onnx.export(program.run_decompositions(table), dynamo=True)``.

    The table has all operators of losses and of their gradients, but none that overwrites its
    argument. Exported programs have such an operator only for a loss with ``inplace_backward``.
    """
    if _ops.LOAD_ERROR is not None:  # without operators, programs have torch operations already
        return {}
    operators = torch.ops.fused_xent
    return {
        operators.loss.default: _loss,
        operators.forward.default: _forward,
        operators.forward_with_statistics.default: partial(_forward, statistics=True),
        operators.backward.default: _backward,
        operators.selected_log_probs.default: _selected_log_probs,
        operators.add_up_shards.default: _add_up_shards,
        operators.linear_forward.default: _linear_forward,
        operators.linear_backward.default: _linear_backward,
        operators.linear_selected_log_probs.default: _linear_selected_log_probs,
    }


def _loss(*arguments: Any, **options: Any) -> Tensor:
    return _forward(*arguments, **options)[0]


def _forward(*arguments: Any, statistics: bool = False, **options: Any) -> tuple[Tensor, ...]:
    problem = _autograd.problem_of(statistics, *arguments, **options)
    logits, target, *_, target_indices, settings = problem
    results = _formulas.by_torch(problem)
    loss = results.loss.to(settings.loss_dtype or logits.dtype)
    rows = row_shape(logits, settings.dim)
    # Only the kernels' backward reads the state. NaN shows if it is used by mistake.
    size = state_size(target, target_indices, options)
    acc = accumulation_dtype(logits.dtype)
    state = logits.new_full([size, *rows], torch.nan, dtype=acc)
    of_statistics = (results.lse, results.entropy, results.argmax) if statistics else ()
    return loss, _formulas.total_weight(problem), state, *of_statistics


def _backward(*arguments: Any, **options: Any) -> Any:
    """Return the gradient, by the formulas of csrc/xent_math.h, with its names."""
    problem, saved, (grad_loss, grad_lse, grad_entropy) = _autograd.of_backward(
        *arguments, **options
    )
    logits, _, _, token_weight, *_, settings = problem
    dim, softcap = settings.dim, options.get("softcap")
    x = logits.to(accumulation_dtype(logits.dtype))
    z = reference.transform(x, softcap, options.get("logit_scale", 1.0))
    kept, q = _labels(problem, x)
    z, mass = z.masked_fill(~kept, 0), q.sum(dim, keepdim=True)
    log_p = reference.log_softmax(z, dim)
    p = log_p.exp()

    def rows(values: Tensor) -> Tensor:
        return values.to(x.dtype) if values.dim() == 0 else values.to(x.dtype).unsqueeze(dim)

    gradient = torch.zeros_like(x)
    if grad_loss is not None:
        g = rows(grad_loss)
        if settings.reduction == REDUCTIONS["mean"]:
            g = reference.divided(g, saved.total_weight)
        if token_weight is not None:
            g = g * rows(token_weight)
        lse = z.logsumexp(dim, keepdim=True)
        gamma = options.get("focal_gamma", 0.0)
        cross_entropy = -reference.weighted_sum(q, log_p, dim).unsqueeze(dim)
        slope: Any = _formulas.focal_slope(cross_entropy, mass, gamma) if gamma else 1.0
        # Where p is nearly 1, log_p has the digits that p has not.
        difference = torch.where(p > 0.5, mass * log_p.expm1() + (mass - q), mass * p - q)
        gradient = g * slope * difference
        gradient = gradient + 2 * options.get("lse_square_scale", 0.0) * g * lse * p
    if grad_lse is not None:
        gradient = gradient + rows(grad_lse) * p
    if grad_entropy is not None:
        finite_log_p = log_p.masked_fill(log_p.isneginf(), 0)
        entropy = -(p * finite_log_p).sum(dim, keepdim=True)
        gradient = gradient - rows(grad_entropy) * p * (finite_log_p + entropy)
    gradient = gradient * options.get("logit_scale", 1.0)
    if softcap:
        gradient = gradient * (1 - (z / softcap).square())
    return gradient.masked_fill(~kept, 0).to(logits.dtype)


def _selected_log_probs(
    logits: Tensor,
    index: Tensor,
    dim: int,
    with_entropy: bool,
    inplace_backward: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    log_probs, entropy = _selected.by_torch(logits, index, dim, options)
    ignore_index = options.get("ignore_index", reference.PADDING)
    token_weight = (index != ignore_index).any(dim).to(log_probs.dtype)
    # As above, only the kernels' backward reads the state.
    state = token_weight.new_full([2, *token_weight.shape], torch.nan)
    return log_probs, state, token_weight, entropy if with_entropy else entropy.new_empty([0])


def _labels(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that count, and the weight q of each class in a row's loss."""
    _, target, weight, token_weight, _, target_indices, settings = problem
    dim, n_classes = settings.dim, x.shape[settings.dim]
    smoothing = settings.of_operators.get("label_smoothing", 0.0)
    w = x.new_ones(n_classes) if weight is None else weight.to(x.dtype)
    w = w.reshape([-1] + [1] * (x.dim() - dim - 1))
    kept = torch.ones_like(x.select(dim, 0), dtype=torch.bool)
    if token_weight is not None:
        kept = token_weight != 0
    if target_indices is not None:
        target = reference.dense_labels(
            target.to(x.dtype), target_indices, n_classes, dim, settings.ignore_index
        )
    if target.is_floating_point():
        kept = kept.unsqueeze(dim)
        q = w * ((1 - smoothing) * target.to(x.dtype) + smoothing / n_classes)
        return kept, q.masked_fill(~kept, 0)
    index = target.to(torch.int64)
    kept = (kept & (index != settings.ignore_index)).unsqueeze(dim)
    is_class = ((index >= 0) & (index < n_classes)).unsqueeze(dim)
    index = index.clamp(0, n_classes - 1).unsqueeze(dim)
    one_hot = torch.zeros_like(x).scatter(dim, index, 1).masked_fill(~is_class, torch.nan)
    # Not 0 times the weight of another class, which may be infinite.
    q = (1 - smoothing) * torch.where(one_hot == 0, 0, w * one_hot)
    if smoothing:
        q = q + smoothing / n_classes * w
    return kept, q.masked_fill(~kept, 0)


def _linear_forward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    inputs = Inputs._make((*arguments, options))
    problem = inputs.problem_of_all(Layer(*inputs[:3]).logits(inputs.logits_dtype))
    loss, _, _, *statistics = results = _ops.forward(problem)
    found = (loss, *statistics)
    upstream = Upstream(torch.ones_like(loss), None, None)
    gradients = _linear_gradients(inputs, problem, results, upstream)
    return *found, *_linear.empty_results(inputs)[len(found) : 4], *gradients


def _linear_backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    upstream, inputs = _linear.of_backward(*arguments, **options)
    problem = inputs.problem_of_all(Layer(*inputs[:3]).logits(inputs.logits_dtype))
    return _linear_gradients(inputs, problem, _ops.forward(problem), upstream)


def _linear_gradients(
    inputs: Inputs, problem: Problem, results: Sequence[Tensor], upstream: Upstream
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias; empty tensors where not needed."""
    grad_logits = _ops.backward(problem, _ops.saved_of(results), upstream).flatten(1)
    bias: Any  # not None where its gradient is needed
    hidden, weight, bias = inputs[:3]
    flat = weight.flatten(0, -2).to(grad_logits.dtype)
    none = hidden.new_empty([0])
    needs_hidden, needs_weight, needs_bias = inputs.needs
    return (
        (grad_logits @ flat).to(hidden.dtype) if needs_hidden else none,
        (grad_logits.t() @ hidden.to(flat.dtype)).view_as(weight).to(weight.dtype)
        if needs_weight
        else none,
        grad_logits.sum(0).view_as(bias).to(bias.dtype) if needs_bias else none,
    )


def _linear_selected_log_probs(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    inputs = LinearInputs._make((*arguments, options))
    logits = Layer(*inputs[:3]).logits(inputs.logits_dtype)
    operator = torch.ops.fused_xent.selected_log_probs.default
    log_probs, _, _, entropy = operator(
        logits, inputs.target_indices, 1, inputs.with_entropy, **options
    )
    return log_probs, entropy


def _add_up_shards(
    max: Tensor,
    log_sum: Tensor,
    part: Tensor | None,
    label_mass: Tensor | None,
    entropy: Tensor | None,
    argmax: Tensor | None,
    first_class: Tensor | None,
    end_class: Tensor | None,
    token_weight: Tensor | None,
    is_bad: Tensor | None,
    rank: int,
    n_classes: int,
    keeps_mass: bool,
    *,
    lse_square_scale: float = 0.0,
    focal_gamma: float = 0.0,
) -> tuple[Tensor, ...]:
    """Add up as ``csrc/xent_shards.h`` does: its comments say why."""
    if first_class is not None and end_class is not None:
        is_right = _has_all_classes(first_class[:, 0], end_class[:, 0], n_classes)
        log_sum = log_sum.masked_fill(~is_right, torch.nan)
    top, top_rank = max.max(0)
    is_top = torch.arange(len(max), device=max.device).unsqueeze(1) == top_rank
    others = torch.where(is_top, torch.expm1(log_sum), torch.exp(max - top + log_sum)).sum(0)
    of_all = torch.log1p(others)
    rise = (of_all - log_sum) - (max - top)
    weight = torch.ones_like(top) if token_weight is None else token_weight
    is_unread, lse, none = weight == 0, top + of_all, max.new_empty(0)
    state, loss, other_mass = [top, of_all], none, none
    if part is not None:
        q = (~(part < 0)).to(part.dtype) if label_mass is None else label_mass
        part = part.clamp(min=0) if label_mass is None else part
        loss = (part + (q * rise).masked_fill(q == 0, 0)).sum(0)
        loss, slope = _focal(loss, q.sum(0), focal_gamma)
        state += ([q[rank]] if keeps_mass else []) + ([slope] if focal_gamma else [])
        loss = weight * (loss + lse_square_scale * lse**2 if lse_square_scale else loss)
        others = torch.cat([q[:rank], q[rank + 1 :]]).sum(0)
        other_mass = (weight * slope * others).masked_fill(is_unread | (others == 0), 0)
        if label_mass is None:  # the class of each row is on one rank
            is_torn = q.sum(0) != 1
            is_bad = is_torn if is_bad is None else is_bad | is_torn
        if is_bad is not None:
            other_mass = other_mass.masked_fill(is_bad & ~is_unread, torch.nan)
            loss = loss.masked_fill(is_bad, torch.nan)
        loss = loss.masked_fill(is_unread, 0)
    return AddedUp(
        torch.stack(state),
        rise if part is None else none,
        loss,
        other_mass,
        none if argmax is None else lse.masked_fill(is_unread, 0),
        none if entropy is None else _entropy(entropy, rise).masked_fill(is_unread, 0),
        none.long()
        if argmax is None
        else _argmax(argmax, log_sum, top_rank).masked_fill(is_unread, -1),
    )


def _focal(cross_entropy: Tensor, mass: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the focal loss, and its derivative by the cross-entropy."""
    if not gamma:
        return cross_entropy, torch.ones_like(mass)
    slope = _formulas.focal_slope(cross_entropy, mass, gamma)
    return reference.focal(cross_entropy, mass, gamma), slope


def _entropy(entropy: Tensor, rise: Tensor) -> Tensor:
    """Return the entropy over all classes from those of the shards (n_ranks, rows)."""
    share = torch.exp(-rise)
    return (share * (entropy + rise)).masked_fill(share == 0, 0).sum(0)


def _argmax(argmax: Tensor, log_sum: Tensor, top_rank: Tensor) -> Tensor:
    """Return the argmax over all classes from those of the shards, which are bits of integers."""
    is_nan = log_sum.isnan()
    rank = torch.where(is_nan.any(0), is_nan.long().argmax(0), top_rank)
    classes = argmax.view(torch.int32 if argmax.dtype == torch.float32 else torch.int64).long()
    return classes.gather(0, rank.unsqueeze(0)).squeeze(0)


def _has_all_classes(first: Tensor, end: Tensor, n_classes: int) -> Tensor:
    """Return whether the ranks have the classes [0, n_classes), in the order of the ranks."""
    before = torch.cat([end.new_zeros(1), torch.cummax(end, 0).values[:-1]])
    return ((first == before) | (first == end)).all() & (end.max() == n_classes)


for _operator, _function in decompositions().items():
    _ops.by_torch_operations[_operator._schema.name.split("::")[1]] = _function
