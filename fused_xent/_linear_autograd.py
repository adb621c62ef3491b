"""The autograd Function of a linear layer and its loss: what is saved, and what is made when."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _linear, _ops
from ._autograd import Options, Tensors, is_batched
from ._checks import is_autocast

_NO_GRADIENTS = (None,) * 8  # of the inputs beside hidden, weight and bias


def evaluate(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    tensors: Tensors,
    options: Options,
    classes: list[int],
    chunk_rows: int | None,
) -> tuple:
    """Return loss, lse, entropy and argmax; without statistics, only the loss of these is meant.

    Hidden is (N, H), linear_weight (K, H) and linear_bias (K,); the logits that the other tensors
    belong to would be (N, *classes).
    """
    layer, others = (hidden, linear_weight, linear_bias), tensors[1:]
    is_recorded = torch.is_grad_enabled()
    needs = [is_recorded and tensor is not None and tensor.requires_grad for tensor in layer]
    if any(needs):
        return LinearCrossEntropy.apply(*layer, *others, options, classes, chunk_rows, needs)
    return _linear.forward(*_operands((*layer, *others), options, classes, chunk_rows, needs))[:4]


def _operands(tensors, options: Options, classes, chunk_rows, needs) -> tuple:
    _, *arguments = options.for_forward()
    return *tensors, classes, *arguments, chunk_rows, needs


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients from one matrix product for each of logits, grad_hidden and grad_weight.

    The gradients are made with the loss, for an upstream gradient of 1, and are given away once, in
    the first backward; any later one makes them anew. They are made in the backward alone where
    they depend on more than a factor, and in float16, whose range they need a loss scale to fit.
    """

    @staticmethod
    def forward(ctx, *inputs):
        """Return loss, lse, entropy and argmax.

        The inputs are hidden, weight and bias of the layer, all Tensors but logits, Options,
        classes, chunk_rows and needs.
        """
        *tensors, ctx.options, ctx.classes, ctx.chunk_rows, ctx.needs = inputs
        is_compiling = torch.compiler.is_compiling()
        ctx.has_gradients = (
            ctx.options.reduction != "none"
            and tensors[0].dtype != torch.float16
            # Compiled code gives zeros for those gradients of statistics that there are not.
            and not (ctx.options.statistics and is_compiling)
        )
        needs = ctx.needs if ctx.has_gradients else [False] * 3
        operands = _operands(tensors, ctx.options, ctx.classes, ctx.chunk_rows, needs)
        *results, grad_hidden, grad_weight, grad_bias = _linear.forward(*operands)
        gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results[3])
        if is_compiling:
            ctx.save_for_backward(*tensors, *gradients)
        else:  # not among what is saved: there, to be scaled in place would be an error
            ctx.gradients = gradients if ctx.has_gradients else None
            ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx, *upstream):
        """Return the gradients of hidden, weight and bias."""
        grad_loss, *of_statistics, _ = upstream
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            gradients = ctx.saved_tensors[7:] if ctx.has_gradients else None
        else:  # kept no longer than what autograd saves, whether they are of use or not
            gradients, ctx.gradients = ctx.gradients, None
        if not ctx.options.statistics:  # compiled code gives zeros for them
            of_statistics = [None, None]
        upstream = (grad_loss, *of_statistics)
        if all(grad is None for grad in upstream):
            return None, None, None, *_NO_GRADIENTS
        if torch.is_grad_enabled():
            return *_with_graph(ctx, upstream), *_NO_GRADIENTS
        if gradients is None or any(grad is not None for grad in of_statistics):
            operands = _operands(
                ctx.saved_tensors[:7], ctx.options, ctx.classes, ctx.chunk_rows, ctx.needs
            )
            gradients = _linear.backward(*upstream, *operands)
        elif is_compiling or is_batched(grad_loss):
            gradients = [(gradient * grad_loss).to(gradient.dtype) for gradient in gradients]
        else:
            for gradient, needed in zip(gradients, ctx.needs, strict=True):
                if needed:
                    _scale(gradient, grad_loss)
        wanted = (
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs, strict=True)
        )
        return *wanted, *_NO_GRADIENTS


def _scale(gradient: Tensor, grad_loss: Tensor) -> None:
    """Multiply in place; where that is by 1, without a pass over memory and unknown to the host."""
    rows = gradient if gradient.dim() == 2 else gradient.unsqueeze(0)
    target = rows.new_zeros(rows.shape[0], dtype=torch.uint8)
    _ops.scale_gradient_(rows, grad_loss, target, None, 1, -1)


def _with_graph(ctx, upstream: tuple) -> tuple:
    """Return gradients that can be differentiated, by way of all logits."""
    layer, others = ctx.saved_tensors[:3], ctx.saved_tensors[3:7]
    device = layer[0].device
    no_casts = torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()
    with no_casts:  # in the gradients of the product, either
        logits = F.linear(*layer).view(-1, *ctx.classes)
        loss, *results = _autograd.evaluate(Tensors(logits, *others), ctx.options, False)
        entropy, _, lse = results[-3:] if ctx.options.statistics else (None, None, None)
        outputs = [
            (output, grad)
            for output, grad in zip((loss, lse, entropy), upstream, strict=True)
            if grad is not None
        ]
        variables = [tensor for tensor, needed in zip(layer, ctx.needs, strict=True) if needed]
        values, grads = zip(*outputs, strict=True)
        gradients = iter(torch.autograd.grad(values, variables, grads, create_graph=True))
    return tuple(next(gradients) if needed else None for needed in ctx.needs)
