"""The loss of a linear layer whose classes are split over processes: see ``_parallel``.

A rank has the weights of a range of classes. It computes one chunk of rows after another: the
logits of its classes in one buffer, the all-gather of what ``_parallel`` sends of each row, the
gradient in the same buffer, and the products of that. The gradient of the hidden states is the sum
of all ranks' products. They are added in at least float32, while the next chunk is computed.

The hidden states (N, H) are the same on all ranks. With sequence parallelism each rank has a part
of the rows instead: a chunk is then the same range of each rank's part, which is gathered for it,
and each rank gets the gradient of its own rows back.

Every rank must take part in the same collectives, or all wait for ever. So nothing that differs
between ranks, such as the size of a shard, may change the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _formulas, _linear, _parallel, _parallel_rows, reference
from ._autograd import Grads, needs_graph
from ._linear_autograd import Layer, made_in_forward, scaled
from ._options import REDUCTION_NAMES, REDUCTIONS
from ._parallel_rows import Shard
from ._problem import Problem, Saved, Upstream
from ._products import product
from ._torch_private import below_autograd, is_batched_by_autograd
from .reference import CrossEntropyStatistics

Turn = Callable[[Tensor, slice], None]  # turns the logits of a chunk into their gradient
Needs = Sequence[bool]  # whether the gradients of hidden, weight and bias are wanted


class Split(NamedTuple):
    """How a linear layer is split over processes."""

    shard: Shard
    n_own: int  # the first classes of the layer; the others are padding
    sequence_parallel: bool
    reduce_grad_hidden: bool

    @property
    def n_parts(self) -> int:
        """The number of ranks that the rows are split over."""
        return dist.get_world_size(self.shard.group) if self.sequence_parallel else 1


class Chunks(NamedTuple):
    """How the rows are split into chunks: in the same way on all ranks."""

    split: Split
    slices: list[slice]  # of each rank's part of the rows, of almost equal sizes; at least one

    def take(self, tensor: Any, rows: slice) -> Any:
        """Return a chunk of a tensor that has all rows; None and scalars as they are."""
        if tensor is None or tensor.dim() == 0:
            return tensor
        return self._parts(tensor)[:, rows].flatten(0, 1)

    def join(self, chunks: Sequence[Tensor]) -> Tensor:
        """Return a tensor of all rows."""
        return torch.cat([self._parts(chunk) for chunk in chunks], 1).flatten(0, 1)

    def _parts(self, tensor: Tensor) -> Tensor:
        n_parts, (n_rows, *others) = self.split.n_parts, tensor.shape
        return tensor.reshape(n_parts, n_rows // n_parts, *others)


def chunks_of(hidden: Tensor, logits: Tensor, chunk_rows: int | None, split: Split) -> Chunks:
    """Return the chunks of this rank's hidden states. The logits have a dtype, but no values."""
    n_classes = -(-split.shard.n_classes // dist.get_world_size(split.shard.group))
    most = chunk_rows or _linear.most_rows(n_classes * logits.element_size(), hidden.is_cpu)
    n_rows = hidden.shape[0]
    if n_rows == 0:
        return Chunks(split, [slice(0, 0)])
    return Chunks(split, list(_linear.chunks(n_rows, max(1, most // split.n_parts))))


# ---- products ------------------------------------------------------------------------------------


def multiply(
    layer: Layer, logits_dtype: torch.dtype, chunks: Chunks, needs: Needs, turn: Turn
) -> Grads:
    """Compute logits, turn them into their gradient, and multiply that; return the gradients."""
    split, slices = chunks
    hidden, linear_weight, linear_bias = layer.hidden, layer.linear_weight, layer.linear_bias
    own = linear_weight[: split.n_own].t()
    bias = None if linear_bias is None else linear_bias[: split.n_own]
    gradients = _Gradients(layer, split, needs, len(slices))
    n_most = split.n_parts * slices[0].stop
    memory = hidden.new_empty(n_most, split.n_own, dtype=logits_dtype)
    # Tensors are already cast; turn autocast off.
    with below_autograd(), torch.autocast(hidden.device.type, enabled=False):
        for rows, x in zip(slices, _hidden_of_chunks(hidden, chunks), strict=True):
            logits = memory[: len(x)]
            product(x, own, logits, bias)
            turn(logits, rows)
            gradients.add(logits, x, rows)
        return gradients.results()


def _hidden_of_chunks(hidden: Tensor, chunks: Chunks) -> Iterator[Tensor]:
    """Yield each chunk's rows. Those of the next chunk are gathered while one is computed."""
    split, slices = chunks
    if not split.sequence_parallel:
        yield from (hidden[rows] for rows in slices)
        return

    def start(rows: slice) -> tuple[Tensor, Any]:
        part = hidden[rows].contiguous()
        found = part.new_empty(split.n_parts * len(part), part.shape[1])
        gather = _parallel_rows.collective("all_gather")
        return found, gather(found, part, split.shard.group, async_op=True)

    found, work = start(slices[0])
    for following in slices[1:]:
        work.wait()
        of_chunk, (found, work) = found, start(following)
        yield of_chunk
    work.wait()
    yield found


class _Gradients:
    """The gradients of a layer, summed over chunks and ranks in at least float32."""

    def __init__(self, layer: Layer, split: Split, needs: Needs, n_chunks: int) -> None:
        hidden, weight, bias = layer
        self.layer, self.split = layer, split
        self.sums = torch.float32 if hidden.element_size() == 2 else hidden.dtype
        self.grad_hidden = torch.empty_like(hidden) if needs[0] else None
        self.grad_weight = self.grad_bias = None
        self.pending: tuple[slice, Tensor, Tensor, Any] | None = None
        if needs[1]:
            self.grad_weight = weight.new_empty(
                weight.shape, dtype=self.sums if n_chunks > 1 else None
            )
            self.grad_weight[split.n_own :] = 0
        if needs[2] and bias is not None:
            self.grad_bias = bias.new_zeros(bias.shape, dtype=self.sums)

    def add(self, grad_logits: Tensor, hidden: Tensor, rows: slice) -> None:
        """Add the gradients of a chunk; the first chunk starts at row 0."""
        n_own = self.split.n_own
        if self.grad_hidden is not None:
            self._add_hidden(self.grad_hidden, grad_logits, rows)
        if self.grad_weight is not None:
            beta = 0 if rows.start == 0 else 1
            product(grad_logits.t(), hidden, self.grad_weight[:n_own], beta=beta)
        if self.grad_bias is not None:
            self.grad_bias[:n_own] += grad_logits.sum(0, dtype=self.sums)

    def _add_hidden(self, grad_hidden: Tensor, grad_logits: Tensor, rows: slice) -> None:
        own = self.layer.linear_weight[: self.split.n_own]
        if not self.split.reduce_grad_hidden:
            product(grad_logits, own, grad_hidden[rows])
            return
        part = grad_hidden.new_empty(len(grad_logits), own.shape[1], dtype=self.sums)
        product(grad_logits, own, part)
        self._finish()
        group = self.split.shard.group
        if self.split.sequence_parallel:
            found = part.new_empty(rows.stop - rows.start, own.shape[1])
            scatter = _parallel_rows.collective("reduce_scatter")
            work = scatter(found, part, group=group, async_op=True)
        else:
            found, work = part, dist.all_reduce(part, group=group, async_op=True)
        self.pending = (rows, found, part, work)

    def _finish(self) -> None:
        """Wait until the last chunk's gradient is added up over the ranks; keep it."""
        if self.pending is None or self.grad_hidden is None:
            return
        rows, found, _, work = self.pending
        work.wait()
        self.grad_hidden[rows] = found
        self.pending = None

    def results(self) -> Grads:
        """Return the gradients in the dtype of their tensors; None for those not needed."""
        self._finish()
        dtype = self.layer.hidden.dtype
        return tuple(
            None if gradient is None else gradient.to(dtype)
            for gradient in (self.grad_hidden, self.grad_weight, self.grad_bias)
        )


# ---- the loss ------------------------------------------------------------------------------------


def evaluate(
    layer: Layer, problem: Problem, chunk_rows: int | None, split: Split
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics.

    Hidden is (N, H). The problem's logits have the shape of all rows, but no values.
    """
    _parallel.check_gradients(problem)
    if needs_graph(problem.target):
        raise RuntimeError(
            "target must not require a gradient with process_group, got one that does: detach it, "
            "or compute the logits for cross_entropy, which has the gradient of probabilities"
        )
    n_own = split.n_own
    problem = problem._replace(logits=problem.logits[:, :n_own])
    if problem.target.dim() == 2 and problem.target_indices is None:
        problem = problem._replace(target=problem.target[:, :n_own])
    if problem.weight is not None:
        problem = problem._replace(weight=problem.weight[:n_own])
    chunks = chunks_of(layer.hidden, problem.logits, chunk_rows, split)
    needs = made_in_forward(layer, problem.settings.reduction)
    results = LinearVocabularyParallel.apply(*layer, *problem, chunks, needs)
    return _parallel.complete(problem, results, split.shard)


_N_LAYER, _N_INPUTS = len(Layer._fields), len(Layer._fields) + len(Problem._fields)


class LinearVocabularyParallel(torch.autograd.Function):
    """The loss of all shards; the gradients of this rank's layer.

    As without process_group, the forward computes the gradients of a mean or a sum for an upstream
    gradient of 1, and only the first backward can return them.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return loss, and with statistics lse, entropy, argmax and the class of the top label.

        The inputs are a Layer's, a Problem's, the Chunks, and which gradients to compute.
        """
        layer, problem = Layer(*inputs[:_N_LAYER]), Problem(*inputs[_N_LAYER:_N_INPUTS])
        chunks, needs = inputs[_N_INPUTS:]
        shard, settings = chunks.split.shard, problem.settings
        total = _total_weight(problem, shard)
        problem = problem._replace(normalizer=total)
        found = []

        def turn(logits: Tensor, rows: slice) -> None:
            of_rows = _problem_of(problem, logits, chunks, rows)
            local = _parallel_rows.local_problem(of_rows, shard)
            results = _parallel_rows.exchange(of_rows, local, shard)
            found.append(results)
            if any(needs):
                one = Upstream(results.others.new_ones(()), None, None)
                _parallel.write_gradient_(local.problem, results.saved, one, results.others)

        ctx.gradients = multiply(layer, problem.logits.dtype, chunks, needs, turn)
        ctx.chunks, ctx.made, ctx.settings = chunks, needs, settings
        ctx.set_materialize_grads(False)
        # Rows first, as in all tensors that are split into chunks.
        state = chunks.join([rows.saved.state.t() for rows in found])
        others = chunks.join([rows.others for rows in found])
        entropy = None
        if settings.statistics:
            entropy = chunks.join([rows.saved.entropy for rows in found])
        ctx.save_for_backward(*layer, *problem[:-1], state, entropy, others)
        losses = chunks.join([rows.losses for rows in found])
        loss = reference.reduce(losses, REDUCTION_NAMES[settings.reduction], total)
        loss = loss.to(settings.loss_dtype or problem.logits.dtype)
        statistics = [chunks.join(x) for x in zip(*[x.statistics for x in found], strict=True)]
        ctx.mark_non_differentiable(*statistics[2:])
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        """Return the gradients of hidden, weight and bias."""
        gradients, ctx.gradients = ctx.gradients, None  # freed as saved tensors are
        grad_loss: Any
        grad_loss, *of_statistics = Upstream(*(*upstream, None, None)[:3])
        none = (None,) * (_N_INPUTS + 2 - _N_LAYER)
        if all(grad is None for grad in (grad_loss, *of_statistics)):
            return None, None, None, *none
        check_backward(*upstream)
        needs = ctx.needs_input_grad[:_N_LAYER]
        is_made = all(made or not needed for needed, made in zip(needs, ctx.made, strict=True))
        if gradients is None or not is_made or any(grad is not None for grad in of_statistics):
            found = _recomputed(ctx, Upstream(grad_loss, *of_statistics), needs)
        else:
            found = tuple(
                scaled(gradient, grad_loss) if needed else None
                for gradient, needed in zip(gradients, needs, strict=True)
            )
        return *found, *none


def check_backward(*upstream: Tensor | None) -> None:
    """Refuse second derivatives and batches of upstream gradients."""
    _parallel.check_first_derivative()
    if any(map(is_batched_by_autograd, upstream)):
        raise RuntimeError("process_group must be None for is_grads_batched=True")


def _recomputed(ctx: Any, upstream: Upstream, needs: Needs) -> Grads:
    """Return the gradients, from the same logits as in the forward."""
    *tensors, state, entropy, others = ctx.saved_tensors
    layer = Layer(*tensors[:_N_LAYER])
    problem = Problem._make([*tensors[_N_LAYER:], ctx.settings])
    chunks: Chunks = ctx.chunks

    def turn(logits: Tensor, rows: slice) -> None:
        of_rows = _problem_of(problem, logits, chunks, rows)
        own = _parallel_rows.local_problem(of_rows, chunks.split.shard).problem
        of_row = [chunks.take(grad, rows) for grad in (state, entropy, others, *upstream)]
        saved = Saved(problem.normalizer, of_row[0].t().contiguous(), of_row[1])
        _parallel.write_gradient_(own, saved, Upstream(*of_row[3:]), of_row[2])

    return multiply(layer, problem.logits.dtype, chunks, needs, turn)


def _problem_of(problem: Problem, logits: Tensor, chunks: Chunks, rows: slice) -> Problem:
    """Return the problem of a chunk."""
    return problem._replace(
        logits=logits,
        target=chunks.take(problem.target, rows),
        token_weight=chunks.take(problem.token_weight, rows),
        target_indices=chunks.take(problem.target_indices, rows),
    )


def _total_weight(problem: Problem, shard: Shard) -> Tensor | None:
    """Return the divisor of the mean, which the gradient of every chunk needs.

    Of class weights each rank has only its own: their sums are gathered, 8 bytes of each rank.
    """
    is_mean = problem.settings.reduction == REDUCTIONS["mean"]
    if problem.normalizer is not None or not is_mean:
        return problem.normalizer
    if problem.weight is None or not _parallel_rows.has_indices(problem):
        return _formulas.total_weight(problem)
    own = _parallel_rows.local_problem(problem, shard).problem
    weights: Any = own.token_weight
    weights = weights * _parallel_rows.class_weights(own)
    return _parallel_rows.all_gather(weights.sum(dtype=torch.float64).view(1), shard.group).sum()
