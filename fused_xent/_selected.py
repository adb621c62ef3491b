"""The log-probabilities of selected classes under autograd, and the operators of a linear layer.

Minus the log-probability of one class is the loss of class indices. For ``K`` classes the forward
is the operator ``selected_log_probs``. With upstream gradients ``g``, the gradient of the logits is
minus that of the loss of sparse labels ``g``, so the backward is that of the loss.

``linear_selected_log_probs`` takes ``hidden`` (N, H), ``linear_weight`` (C, H), ``linear_bias``
(C,) and ``target_indices`` (N, K). It returns log-probabilities and entropy (empty if it is not
wanted), and computes one chunk of logits after another. Its backward is ``linear_backward``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import _autograd, _linear, _linear_autograd, _ops, reference
from ._autograd import Grads, Tensors, is_traced, needs_graph
from ._linear import Inputs
from ._linear_autograd import Layer
from ._options import REDUCTIONS, Settings
from ._overwriting import check_overwritable
from ._problem import Problem, Saved, Upstream, accumulation_dtype, check_classes, is_checked
from ._torch_private import (
    apply_at_this_level,
    apply_in_eager,
    are_ordinary,
    below_autograd,
    is_eager,
    is_under_torch_func,
    unwrap_dead_wrappers,
)
from .reference import PADDING, SelectedLogProbs


def evaluate(problem: Problem) -> Tensors:
    """Return the log-probabilities; with statistics, after them the entropy.

    The problem's target holds the selected classes. It is checked, but for their range.
    """
    logits, index, *_, settings = problem
    if index.dim() < logits.dim():
        return _of_one_class(problem)
    check_overwritable(problem)
    if _autograd.is_for_torch(problem):
        check_range(index, logits.shape[settings.dim])
        results = by_torch(logits, index, settings.dim, settings.of_operators)
        return results if settings.statistics else results[:1]
    if is_traced():
        inplace = {"inplace_backward": True} if settings.inplace_backward else {}
        found = _ops.selected_log_probs(logits, index, settings, **inplace)
    elif is_under_torch_func():
        found = Selected.apply(logits, index, settings)
    elif needs_graph(logits):
        inputs = unwrap_dead_wrappers((logits, index, settings))
        found = apply_in_eager(Selected, *inputs)
    else:
        found = _forward(logits, index, settings)
    return (found[0], found[3]) if settings.statistics else (found[0],)


def evaluate_plain(logits: Tensor, index: Tensor, settings: Settings) -> Tensor:
    """Return the log-probabilities of a plain call (see _autograd)."""
    is_one = index.dim() < logits.dim()
    if needs_graph(logits):
        function = PlainOneClass if is_one else PlainSelected
        return apply_in_eager(function, logits, index, settings)  # type: ignore[no-any-return]
    if is_one:
        return minus(_autograd.evaluate_plain(logits, index, settings))
    return _ops.plain_selected(logits, index, settings)[0]


def check_range(index: Tensor, n_classes: int) -> None:
    """Check the classes; not on a GPU, where the host would wait."""
    if is_checked(index):
        check_classes("index", index, n_classes, PADDING, f"{PADDING} (padding)")


def _of_one_class(problem: Problem) -> Tensors:
    loss, *statistics = _autograd.evaluate(problem)
    return minus(loss), *statistics[2:3]


def minus(loss: Tensor) -> Tensor:
    """Return the log-probability. Unlike ``-loss``, it is 0 and not -0 for padding."""
    return 0 - loss


def by_torch(logits: Tensor, index: Tensor, dim: int, options: dict[str, Any]) -> SelectedLogProbs:
    """Compute both results by torch operations, in the kernels' precision."""
    x = logits.to(accumulation_dtype(logits.dtype))
    return reference.selective_log_softmax(x, index, dim=dim, **options)


def _forward(logits: Tensor, index: Tensor, settings: Settings) -> Tensors:
    with below_autograd():
        return _ops.selected_log_probs(logits, index, settings)


class Selected(torch.autograd.Function):
    """Log-probabilities in one read of the logits; gradient in one more read and one write."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return what the operator does; the inputs are logits, index and Settings."""
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save the inputs and a few numbers per row; nothing else of the logits' size."""
        logits, index, ctx.settings = inputs
        _, state, token_weight, entropy = output
        ctx.save_for_backward(logits, index, state, token_weight, entropy)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(state, token_weight)
        if not ctx.settings.statistics:
            ctx.mark_non_differentiable(entropy)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, *grads: Tensor | None) -> Grads:
        """Return the gradient of the logits."""
        grad_entropy = grads[2]
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None
        _, index, _, token_weight, _ = saved_tensors = ctx.saved_tensors  # may be read only once
        of_labels, grad_loss = _as_labels(grad_log_probs, index, token_weight)
        problem, saved = _of_gradient(ctx.settings, of_labels, saved_tensors)
        upstream = Upstream(grad_loss, None, grad_entropy)
        return _autograd.logits_gradient(problem, saved, upstream), None, None


class PlainOneClass(_autograd.PlainCrossEntropy):
    """The log-probability of one class in each row: minus the loss, in one Function."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return the log-probabilities; the inputs are logits, index and Settings."""
        return minus(_autograd.PlainCrossEntropy.forward(ctx, *inputs))

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor) -> Grads:
        """Return the gradient of the logits."""
        return _autograd.PlainCrossEntropy.backward(ctx, -grad_log_probs)


class PlainSelected(torch.autograd.Function):
    """The log-probabilities of K classes in each row, for a plain call: faster than Selected."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return the log-probabilities; the inputs are logits, index and Settings."""
        logits, index, ctx.settings = inputs
        log_probs, state, token_weight, _ = _ops.plain_selected(*inputs)
        ctx.save_for_backward(logits, index, state, token_weight)
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor) -> Grads:
        """Return the gradient of the logits."""
        logits, index, state, token_weight = saved_tensors = ctx.saved_tensors  # may be read once
        if not torch.is_grad_enabled() and is_eager() and are_ordinary(grad_log_probs, logits):
            minus_one = token_weight.new_full((), -1)
            of_rows = (None, state, minus_one, ctx.settings, token_weight)
            return _ops.plain_backward(logits, grad_log_probs, *of_rows, index), None, None
        problem, saved = _of_gradient(ctx.settings, grad_log_probs, saved_tensors)
        _, grad_loss = _as_labels(grad_log_probs, index, token_weight)
        upstream = Upstream(grad_loss, None, None)
        return _autograd.logits_gradient(problem, saved, upstream), None, None


def _of_gradient(
    settings: Settings, of_labels: Tensor, saved_tensors: Tensors
) -> tuple[Problem, Saved]:
    """Return the loss of these labels, and what its forward would have saved."""
    logits, index, state, token_weight, *entropy = saved_tensors
    problem = Problem(logits, of_labels, None, token_weight, None, index, settings)
    return problem, Saved(None, state, entropy[0] if entropy else None)


def _as_labels(
    grad_log_probs: Tensor | None, index: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return labels, and the upstream gradient of their loss, whose gradient is the wanted one."""
    if grad_log_probs is None:
        return token_weight.new_zeros(index.shape), None
    return grad_log_probs, token_weight.new_full((), -1).expand(token_weight.shape)


# ---- from hidden states --------------------------------------------------------------------------


class LinearInputs(NamedTuple):
    """The arguments of the operator, in their order."""

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target_indices: Tensor
    with_entropy: bool
    logits_dtype: torch.dtype
    chunk_rows: int | None
    options: dict[str, Any]

    def token_weight(self) -> Tensor:
        """Return 1 for each row, or 0 where all classes are padding."""
        ignore_index = self.options.get("ignore_index", PADDING)
        counts: Tensor = (self.target_indices != ignore_index).any(1)
        return counts.to(accumulation_dtype(self.logits_dtype))

    def inputs(self, target: Tensor) -> Inputs:
        """Return the arguments of the operators of a loss of labels on the selected classes."""
        return Inputs(
            hidden=self.hidden,
            linear_weight=self.linear_weight,
            linear_bias=self.linear_bias,
            target=target,
            weight=None,
            token_weight=self.token_weight(),
            normalizer=None,
            target_indices=self.target_indices,
            reduction=REDUCTIONS["none"],
            logits_dtype=self.logits_dtype,
            loss_dtype=accumulation_dtype(self.logits_dtype),
            statistics=self.with_entropy,
            chunk_rows=self.chunk_rows,
            needs=(0, 0, 0),
            options=self.options,
        )


_N_TENSORS: Final = 4  # of LinearInputs
_SIGNATURE = (
    "(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target_indices, bool "
    "with_entropy, ScalarType logits_dtype, SymInt? chunk_rows, *, int ignore_index=-100, "
    "float softcap=0.0, float logit_scale=1.0) -> (Tensor log_probs, Tensor entropy)"
)


def evaluate_linear(layer: Layer, problem: Problem, chunk_rows: int | None) -> Tensors:
    """Return the log-probabilities; with statistics, after them the entropy.

    Hidden is (N, H), and the problem's target (N, K) holds the selected classes. Its logits have a
    dtype, but no values.
    """
    logits, index, *_, settings = problem
    statistics, of_operators = settings.statistics, settings.of_operators
    inputs = LinearInputs(*layer, index, statistics, logits.dtype, chunk_rows, of_operators)
    *arguments, options = inputs
    if is_traced():
        results = linear_forward(*arguments, **options)
    elif needs_graph(*layer):
        results = LinearSelected.apply(*inputs)
    else:
        results = _forward_linear(*inputs)
    return results if statistics else results[:1]  # type: ignore[no-any-return]


def _forward_linear(*inputs: Any) -> Tensors:
    *arguments, options = inputs
    with below_autograd():
        return linear_forward(*arguments, **options)  # type: ignore[no-any-return]


class LinearSelected(torch.autograd.Function):
    """The logits are computed in the forward, and again in the backward; nothing of them is kept.

    This is the autograd formula of the operator.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        """Return what the operator does; the inputs are LinearInputs."""
        arguments = LinearInputs(*inputs)
        results = _forward_linear(*arguments)
        ctx.save_for_backward(*arguments[:_N_TENSORS])
        ctx.others = arguments[_N_TENSORS:]
        ctx.set_materialize_grads(False)
        if not arguments.with_entropy:
            ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Grads:
        """Return the gradients of hidden, weight and bias."""
        needs, others = ctx.needs_input_grad[:3], [None] * (len(LinearInputs._fields) - 3)
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, *others
        arguments = LinearInputs(*ctx.saved_tensors, *ctx.others)
        of_labels, grad_loss = _as_labels(
            grad_log_probs, arguments.target_indices, arguments.token_weight()
        )
        inputs = arguments.inputs(of_labels)._replace(statistics=grad_entropy is not None)
        upstream = (grad_loss, None, grad_entropy)
        return *_linear_autograd.recomputed(inputs, upstream, needs), *others


def _linear_by_chunks(*arguments: Any, **options: Any) -> Tensors:
    selected = LinearInputs._make((*arguments, options))
    inputs = selected.inputs(selected.target_indices)
    parts = []

    def select(logits: Tensor, rows: slice) -> None:
        settings = inputs.problem(logits, rows, None).settings
        log_probs, _, _, entropy = _ops.selected_log_probs(
            logits, selected.target_indices[rows], settings
        )
        parts.append((log_probs, entropy))

    _linear.multiply(inputs, select)
    log_probs, entropy = (torch.cat(of_chunks) for of_chunks in zip(*parts, strict=True))
    return log_probs, entropy


def _empty_linear_results(*arguments: Any, **options: Any) -> Tensors:
    selected = LinearInputs._make((*arguments, options))
    acc = accumulation_dtype(selected.logits_dtype)
    rows = selected.target_indices.shape[:1] if selected.with_entropy else (0,)
    log_probs, entropy = (
        selected.hidden.new_empty(shape, dtype=acc)
        for shape in (selected.target_indices.shape, rows)
    )
    return log_probs, entropy


# ---- the operators' formulas ---------------------------------------------------------------------


def _formula(
    logits: Tensor,
    index: Tensor,
    dim: int,
    with_entropy: bool,
    inplace_backward: bool = False,
    **options: Any,
) -> Any:
    acc, none = accumulation_dtype(logits.dtype), REDUCTIONS["none"]
    ignore_index = options.get("ignore_index", PADDING)
    flags = (inplace_backward, False)
    settings = Settings(dim, none, acc, with_entropy, ignore_index, *flags, options)
    if not needs_graph(logits):
        return _forward(logits, index, settings)
    if inplace_backward:
        check_overwritable(Problem(logits, index, None, None, None, None, settings))
    return apply_at_this_level(Selected, logits, index, settings)


def _linear_formula(*arguments: Any, **options: Any) -> Any:
    selected = LinearInputs._make((*arguments, options))
    if needs_graph(*selected[:3]):
        return apply_at_this_level(LinearSelected, *selected)
    return _forward_linear(*selected)


if _ops.LOAD_ERROR is None:
    _ops.register_formula("selected_log_probs", _formula)
    linear_forward = _ops.define(
        "linear_selected_log_probs", _SIGNATURE, _linear_by_chunks, _empty_linear_results
    )
    _ops.register_formula("linear_selected_log_probs", _linear_formula)
