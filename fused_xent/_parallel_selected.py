"""Log-probabilities of selected classes where the classes are split over processes.

Each rank computes those of its own classes, by the softmax over its shard, and one all-gather sends
them with the maximum and the log_sum of each row: ``2 + K`` numbers a row, or ``3 + K`` with the
entropy. The log-probability over all classes is lower by what the other shards add to the lse. That
is a sum of terms of one sign: nothing cancels as the probability approaches 1.

With upstream gradients ``g``, the gradient of the logits is minus that of the loss of sparse labels
``g``, as in ``_selected``. It needs no communication.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _ops, _parallel, _parallel_linear, _parallel_rows
from ._autograd import Grads, Tensors
from ._linear_autograd import Layer
from ._options import Settings
from ._overwriting import check_overwritable
from ._parallel_linear import Split
from ._parallel_rows import NO_CLASS, Shard
from ._problem import Problem, Saved, Upstream, accumulation_dtype, row_shape
from ._torch_private import below_autograd
from .reference import PADDING

NOT_OWN = torch.inf  # sent for a class of another rank: no log-probability is inf


def evaluate(problem: Problem, shard: Shard) -> Tensors:
    """Return the log-probabilities; with statistics, after them the entropy.

    The problem's logits are a shard, and its target holds the selected classes (..., K, ...).
    """
    check_overwritable(problem)
    found = SelectedOfShard.apply(problem.logits, problem.target, problem.settings, shard)
    return _results(found, problem)


def evaluate_linear(
    layer: Layer, problem: Problem, chunk_rows: int | None, split: Split
) -> Tensors:
    """Return the same for a linear layer.

    Hidden is (N, H), and the problem's target (N, K). Its logits have a dtype, but no values.
    """
    chunks = _parallel_linear.chunks_of(layer.hidden, problem.logits, chunk_rows, split)
    settings = problem.settings
    found = LinearSelectedOfShard.apply(
        *layer, problem.target, settings, problem.logits.dtype, chunks
    )
    return _results(found, problem)


def _results(found: Any, problem: Problem) -> Tensors:
    return found if problem.settings.statistics else found[:1]  # type: ignore[no-any-return]


class Index(NamedTuple):
    """What a rank knows of the selected classes, of the index's shape or that of the rows."""

    own: Tensor  # int64: the place of the class in the shard, or NO_CLASS
    is_other: Tensor  # classes of other ranks
    kept: Tensor  # rows that have a class
    is_bad: Tensor  # rows with a class out of range: on GPUs, where this is not checked


def index_of(index: Tensor, dim: int, n_own: int, shard: Shard) -> Index:
    """Return what this rank knows of the selected classes."""
    classes = index.long()
    is_class = classes != PADDING
    is_bad = is_class & ((classes < 0) | (classes >= shard.n_classes))
    own = classes - shard.start
    is_own = is_class & (own >= 0) & (own < n_own)
    own = own.masked_fill(~is_own, NO_CLASS)
    return Index(own, is_class & ~is_own, is_class.any(dim), is_bad.any(dim))


class Found(NamedTuple):
    """The results of all ranks: the same bits on each."""

    log_probs: Tensor
    entropy: Tensor  # empty if it is not wanted
    state: Tensor  # (2, ...): maximum and log_sum of the rows


def exchange(logits: Tensor, index: Tensor, settings: Settings, shard: Shard) -> Found:
    """Send this shard's rows to all ranks, and combine the rows of all ranks."""
    dim, n_own = settings.dim, logits.shape[settings.dim]
    known = index_of(index, dim, n_own, shard)
    rows = _parallel_rows.gather(_own_rows(logits, known, settings), shard, n_own)
    added = _ops.add_up_shards(rows, shard.n_classes, dist.get_rank(shard.group))
    shape = row_shape(logits, dim)
    rise = added.rise.view(len(added.rise), *shape).unsqueeze(dim + 1)
    sent = rows["log_probs"].reshape(len(added.rise), *index.shape)
    of_all = (sent - rise).masked_fill(sent == NOT_OWN, 0).sum(0)
    log_probs = of_all.masked_fill(known.is_bad.unsqueeze(dim), torch.nan)
    log_probs = log_probs.masked_fill(index == PADDING, 0)
    entropy = log_probs.new_empty(0)
    if settings.statistics:
        entropy = added.entropy.view(shape)
        entropy = entropy.masked_fill(known.is_bad, torch.nan).masked_fill(~known.kept, 0)
    return Found(log_probs, entropy, added.state.view(len(added.state), *shape))


def _own_rows(logits: Tensor, index: Index, settings: Settings) -> dict[str, Tensor]:
    """Return what is sent."""
    dim = settings.dim
    if logits.shape[dim] == 0:
        entropy = logits.new_zeros(row_shape(logits, dim), dtype=accumulation_dtype(logits.dtype))
        log_probs = entropy.new_full(index.own.shape, NOT_OWN)
        state: Any = (entropy - torch.inf, entropy)
    else:
        # The operator does not read a row without classes: if all are on other ranks, ask for one.
        is_unread = index.kept & (index.own == NO_CLASS).all(dim)
        asked = index.own.clone()
        asked.select(dim, 0).masked_fill_(is_unread, 0)
        with below_autograd():
            found = _ops.selected_log_probs(logits, asked, _own_settings(settings))
        log_probs, state, _, entropy = found
        # If all logits of the shard are -inf, so is its lse, and its own softmax is NaN.
        log_probs = log_probs.masked_fill(state[1].isneginf().unsqueeze(dim), -torch.inf)
        log_probs = log_probs.masked_fill(index.own == NO_CLASS, NOT_OWN)
    rows = {"max": state[0], "log_sum": state[1], "log_probs": log_probs}
    return {**rows, "entropy": entropy} if settings.statistics else rows


def _own_settings(settings: Settings) -> Settings:
    """Return settings for classes of this shard."""
    options = {**settings.of_operators, "ignore_index": NO_CLASS}
    return settings._replace(of_operators=options, ignore_index=NO_CLASS)


def gradient_of(
    logits: Tensor,
    index: Tensor,
    settings: Settings,
    shard: Shard,
    state: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Problem, Saved, Upstream, Tensor]:
    """Return the arguments of ``_parallel.logits_gradient`` for the gradient of these logits."""
    dim = settings.dim
    known = index_of(index, dim, logits.shape[dim], shard)
    labels = state.new_zeros(index.shape) if grad_log_probs is None else grad_log_probs
    others = labels.masked_fill(~known.is_other, 0).sum(dim)
    others = others.masked_fill(known.is_bad, torch.nan)
    problem = Problem(
        logits, labels, None, known.kept.to(state.dtype), None, known.own, _own_settings(settings)
    )
    minus_one = state.new_full((), -1).expand(others.shape)
    saved = Saved(None, state, None if grad_entropy is None else entropy)
    return problem, saved, Upstream(minus_one, None, grad_entropy), others


class SelectedOfShard(torch.autograd.Function):
    """Log-probabilities of all shards; the gradient of this rank's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return log-probabilities and entropy, of logits, index, Settings and Shard."""
        logits, index, ctx.settings, ctx.shard = inputs
        found = exchange(*inputs)
        ctx.save_for_backward(logits, index, found.state, found.entropy)
        ctx.set_materialize_grads(False)
        if not ctx.settings.statistics:
            ctx.mark_non_differentiable(found.entropy)
        return found.log_probs, found.entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        """Return the gradient of the logits."""
        if all(grad is None for grad in upstream):
            return None, None, None, None
        _parallel_linear.check_backward(*upstream)
        logits, index, state, entropy = ctx.saved_tensors
        inputs = (logits, index, ctx.settings, ctx.shard, state, entropy)
        gradient = _parallel.logits_gradient(*gradient_of(*inputs, *upstream))
        return gradient, None, None, None


class LinearSelectedOfShard(torch.autograd.Function):
    """The same of a linear layer, whose logits are computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return log-probabilities and entropy.

        The inputs are a Layer's, index, Settings, the logits' dtype and Chunks.
        """
        *of_layer, index, settings, logits_dtype, chunks = inputs
        layer, found = Layer(*of_layer), []

        def select(logits: Tensor, rows: slice) -> None:
            of_rows = chunks.take(index, rows)
            found.append(exchange(logits, of_rows, settings, chunks.split.shard))

        no_gradients = (False, False, False)
        _parallel_linear.multiply(layer, logits_dtype, chunks, no_gradients, select)
        log_probs = chunks.join([of_rows.log_probs for of_rows in found])
        state = chunks.join([of_rows.state.t() for of_rows in found])
        entropy = found[0].entropy
        if settings.statistics:
            entropy = chunks.join([of_rows.entropy for of_rows in found])
        else:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(*layer, index, state, entropy)
        ctx.others = settings, logits_dtype, chunks
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        """Return the gradients of hidden, weight and bias."""
        if all(grad is None for grad in upstream):
            return (None,) * 7
        _parallel_linear.check_backward(*upstream)
        *of_layer, index, state, entropy = ctx.saved_tensors
        settings, logits_dtype, chunks = ctx.others
        entropy = entropy if settings.statistics else None

        def turn(logits: Tensor, rows: slice) -> None:
            of_rows = [chunks.take(x, rows) for x in (index, state, entropy, *upstream)]
            of_state = of_rows[1].t().contiguous()
            inputs = (logits, of_rows[0], settings, chunks.split.shard, of_state, *of_rows[2:])
            _parallel.write_gradient_(*gradient_of(*inputs))

        layer, needs = Layer(*of_layer), ctx.needs_input_grad[:3]
        return *_parallel_linear.multiply(layer, logits_dtype, chunks, needs, turn), *(None,) * 4
