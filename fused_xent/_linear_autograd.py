"""The autograd Functions of a linear layer and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _linear, _ops
from ._autograd import Grads, Tensors, is_traced, needs_graph
from ._linear import Inputs
from ._options import REDUCTIONS
from ._problem import Problem, is_autocast
from ._torch_private import apply_at_this_level, below_autograd, is_batched_by_autograd
from .reference import CrossEntropyStatistics

_N_TENSORS: Final = 8  # of Inputs


class Layer(NamedTuple):
    """A linear layer and its inputs: (*rows, H), (C, *D, H) and (C, *D)."""

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Return all logits, (*rows, C, *D)."""
        hidden: Any  # for mypy: these two are never None
        weight: Any
        hidden, weight, bias = (
            None if tensor is None else tensor.to(torch.promote_types(dtype, tensor.dtype))
            for tensor in self
        )
        with _no_casts(hidden):  # autocast would round logits in float32
            if weight.dim() == 2:
                return F.linear(hidden, weight, bias)
            flat_bias = None if bias is None else bias.flatten()
            logits = F.linear(hidden, weight.flatten(0, -2), flat_bias)
        return logits.unflatten(-1, weight.shape[:-1])  # type: ignore[no-any-return]

    def autocast(self) -> Layer:
        """Cast the layer as autocast casts the operands of a matrix product."""
        if not is_autocast(self.hidden):
            return self
        dtype = torch.get_autocast_dtype(self.hidden.device.type)
        hidden: Any  # for mypy: these two are never None
        weight: Any
        hidden, weight, bias = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in self
        )
        return Layer(hidden, weight, bias)


def evaluate(
    layer: Layer, problem: Problem, chunk_rows: int | None
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics.

    Hidden is (N, H). The problem's logits (N, C, *D) have shape, dtype and device, but no values.
    """
    logits, target, *_, settings = problem
    inputs = Inputs(
        *layer,
        target,
        *problem[2:-1],
        settings.reduction,
        logits.dtype,
        settings.loss_dtype or logits.dtype,
        settings.statistics,
        chunk_rows,
        [int(is_made) for is_made in made_in_forward(layer, settings.reduction)],
        settings.of_operators,
    )
    if is_traced():
        *arguments, options = inputs
        results = _linear.forward(*arguments, **options)
    elif needs_graph(*layer):
        results = LinearCrossEntropyInEager.apply(*inputs)
    else:
        results = _forward(inputs)
    if settings.statistics:
        return _autograd.complete(problem, *results[:4])
    return (results[0],)


def made_in_forward(layer: Layer, reduction: int) -> tuple[bool, ...]:
    """Return which gradients the forward computes, for an upstream gradient of 1.

    None where each row has an upstream gradient, and none in float16, where they would underflow
    without a loss scale.
    """
    is_fused = reduction != REDUCTIONS["none"] and layer.hidden.dtype != torch.float16
    return tuple(is_fused and needs_graph(tensor) for tensor in layer)


def _forward(inputs: Inputs) -> Tensors:
    *arguments, options = inputs
    with below_autograd():
        return _linear.forward(*arguments, **options)


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients from one matrix product for each of logits, grad_hidden and grad_weight.

    The forward computes the gradients too where ``made_in_forward`` says so, else the backward.
    This is the autograd formula of the operator.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        """Return what the operator does; the inputs are Inputs."""
        results = _forward(Inputs(*inputs))
        _save(ctx, Inputs(*inputs), results[4:])
        n_differentiable = 3 if Inputs(*inputs).statistics else 1
        ctx.mark_non_differentiable(*results[n_differentiable:])
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        """Return the gradients of hidden, weight and bias."""
        return _backward(ctx, upstream[:3], ctx.saved_tensors[_N_TENSORS:], _multiplied)


class LinearCrossEntropyInEager(torch.autograd.Function):
    """The same in eager mode. The first backward returns the gradients; later ones recompute."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        """Return loss, lse, entropy and argmax."""
        *results, grad_hidden, grad_weight, grad_bias = _forward(Inputs(*inputs))
        _save(ctx, Inputs(*inputs), ())
        # Not in save_for_backward, which forbids to scale them in place.
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(results[3])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        """Return the gradients of hidden, weight and bias."""
        # Freed here as saved tensors are, used or not.
        gradients, ctx.gradients = ctx.gradients, None
        return _backward(ctx, upstream[:3], gradients, scaled)


def _save(ctx: Any, inputs: Inputs, gradients: Tensors) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS], *gradients)
    ctx.arguments, ctx.made = inputs[_N_TENSORS:], inputs.needs
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    upstream: Grads,
    gradients: Tensors | None,
    times: Callable[..., Tensor],
) -> Grads:
    needs = ctx.needs_input_grad[:3]
    grad_loss, *of_statistics = upstream
    if all(grad is None for grad in upstream):
        found: Any = (None, None, None)
    elif (
        torch.is_grad_enabled()
        or gradients is None
        or any(needed and not made for needed, made in zip(needs, ctx.made, strict=True))
        or any(grad is not None for grad in of_statistics)
    ):
        inputs = Inputs(*ctx.saved_tensors[:_N_TENSORS], *ctx.arguments)
        found = recomputed(inputs, upstream, needs)
    else:
        found = [
            times(gradient, grad_loss) if needed else None
            for gradient, needed in zip(gradients, needs, strict=True)
        ]
    return (*found, *[None] * (len(Inputs._fields) - 3))


def recomputed(inputs: Inputs, upstream: Grads, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias, differentiable where grad mode is on."""
    return (_with_graph if torch.is_grad_enabled() else _anew)(inputs, upstream, needs)


def _anew(inputs: Inputs, upstream: Grads, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return gradients from recomputed logits."""
    *arguments, options = inputs._replace(needs=[int(needed) for needed in needs])
    with below_autograd():
        found = _linear.backward(*upstream, *arguments, **options)
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _multiplied(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    return (gradient * grad_loss).to(gradient.dtype)


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiply in place. A factor of 1 costs no pass over memory, and no wait for the GPU."""
    if is_batched_by_autograd(grad_loss):
        return _multiplied(gradient, grad_loss)
    with below_autograd():
        _ops.multiply_(gradient, grad_loss)
    return gradient


def _with_graph(inputs: Inputs, upstream: Grads, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return gradients that can be differentiated, through all logits."""
    # Views, so that a tensor that is given twice has a gradient for each.
    layer: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs[:3]]
    inputs = Inputs._make([*layer, *inputs[3:]])
    variables = [tensor for tensor, needed in zip(layer, needs, strict=True) if needed]
    outputs = [
        (output, grad)
        for output, grad in zip(by_all_logits(inputs), upstream, strict=False)
        if grad is not None
    ]
    values, grads = zip(*outputs, strict=True)
    with _no_casts(inputs.hidden):  # also in the gradients of the product
        found = iter(torch.autograd.grad(values, variables, grads, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def by_all_logits(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return loss, and with statistics lse, entropy and argmax, through all logits."""
    with _no_casts(inputs.hidden):
        logits = Layer(*inputs[:3]).logits(inputs.logits_dtype)
        results = _autograd.evaluate(inputs.problem_of_all(logits))
    if not inputs.statistics:
        return results
    results = cast(CrossEntropyStatistics, results)
    return results.loss, results.lse, results.entropy, results.argmax


def _no_casts(tensor: Tensor) -> Any:
    if not is_autocast(tensor):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


# ---- the operators' formulas ---------------------------------------------------------------------


def _forward_formula(*arguments: Any, **options: Any) -> Any:
    inputs = Inputs._make((*arguments, options))
    if needs_graph(*inputs[3:_N_TENSORS]):
        results = by_all_logits(inputs)
        return *results, *_linear.empty_results(inputs)[len(results) :]
    if needs_graph(*inputs[:3]):
        return apply_at_this_level(LinearCrossEntropy, *inputs)
    return _forward(inputs)


def _backward_formula(*arguments: Any, **options: Any) -> Tensors:
    upstream, inputs = _linear.of_backward(*arguments, **options)
    if needs_graph(*upstream, *inputs[:_N_TENSORS]):
        raise RuntimeError(
            "fused_xent::linear_backward has no derivative: for gradients of gradients, use "
            "fused_xent.linear_cross_entropy"
        )
    with below_autograd():
        return _linear.backward(*arguments, **options)


if _ops.LOAD_ERROR is None:
    _ops.register_formula("linear_forward", _forward_formula)
    _ops.register_formula("linear_backward", _backward_formula)
