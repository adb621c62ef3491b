"""The autograd Functions: the only place that knows what is saved from forward for backward."""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _ops, reference


class Options(NamedTuple):
    """What the operators take besides tensors, in their order."""

    dim: int
    ignore_index: int
    label_smoothing: float
    reduction: str
    loss_dtype: torch.dtype

    def for_forward(self) -> tuple:
        """Return the trailing arguments of the forward operators."""
        return (*self[:3], _ops.REDUCTIONS[self.reduction], self.loss_dtype)

    def for_backward(self) -> tuple:
        """Return the trailing arguments of the backward operators."""
        return (*self[:3], _ops.REDUCTIONS[self.reduction])


def _takes_all_arguments(forward):
    """Give ``forward`` the signature ``(*inputs)``, which is bound in no time.

    ``Function.apply`` binds its arguments to ``forward`` in every call, to fill in defaults; there
    are none, and binding to the true signature takes longer than a small loss.
    """
    forward.__signature__ = inspect.Signature(
        [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]
    )
    return forward


class CrossEntropy(torch.autograd.Function):
    """Loss in one read of the logits; gradient in one more read and one write.

    With ``inplace`` the gradient takes the logits' memory, once: that counts as a modification of
    the logits, which autograd reports to whoever needs them later, a second backward included.
    """

    @staticmethod
    @_takes_all_arguments
    def forward(logits, target, weight, options: Options, inplace: bool):
        """Return the loss, and after it what backward needs."""
        return _ops.forward(logits, target, weight, *options.for_forward())

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the inputs and one or two numbers a row; nothing else of the logits' size."""
        logits, target, weight, ctx.options, ctx.inplace = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(logits, target, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        """Return the gradients of logits and probabilities, by torch operations if recorded."""
        logits, target, weight, *saved = ctx.saved_tensors
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        if grad_loss is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            if ctx.inplace:
                raise RuntimeError(
                    "inplace_backward must be False for create_graph=True: the second derivative "
                    "needs the logits that the first overwrites"
                )
            return *_differentiable_gradients(ctx, grad_loss, logits, target, weight), *[None] * 3
        grad_logits = grad_target = None
        if needs_target:
            grad_target = _target_gradient(ctx.options, grad_loss, logits, target, weight, saved)
        if needs_logits:
            arguments = (grad_loss, logits, target, weight, *saved, *ctx.options.for_backward())
            if ctx.inplace:
                increment_version(logits)
                _ops.backward_(*arguments)
                grad_logits = logits.detach()
            else:
                grad_logits = _ops.backward(*arguments)
        return grad_logits, grad_target, None, None, None


def _target_gradient(options, grad_loss, logits, target, weight, saved) -> Tensor:
    """Return d loss / d target of probabilities: minus the weighted log-probabilities."""
    total_weight, row_max, log_sum, _ = saved
    dim = options.dim
    scale = grad_loss.to(row_max.dtype) * (1 - options.label_smoothing)
    scale = scale / total_weight if options.reduction == "mean" else scale
    minus_log_prob = log_sum.unsqueeze(dim) - (logits - row_max.unsqueeze(dim))
    if weight is not None:
        minus_log_prob = minus_log_prob * weight.reshape([-1] + [1] * (logits.dim() - dim - 1))
    scale = scale if options.reduction != "none" else scale.unsqueeze(dim)
    return (minus_log_prob * scale).to(target.dtype)


def _differentiable_gradients(ctx, grad_loss, logits, target, weight) -> list[Tensor | None]:
    """Return the gradients of logits and target as differentiable functions."""
    options, needs = ctx.options, ctx.needs_input_grad[:2]
    acc = _ops.accumulation_dtype(logits.dtype)
    loss = reference.cross_entropy(
        logits.to(acc),
        target.to(acc) if target.is_floating_point() else target,
        weight,
        options.ignore_index,
        options.reduction,
        options.label_smoothing,
    )
    inputs = [tensor for tensor, needed in zip((logits, target), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(loss, inputs, grad_loss.to(acc), create_graph=True))
    return [next(gradients) if needed else None for needed in needs]


class CrossEntropyGradInForward(torch.autograd.Function):
    """Loss and gradient in one read and one write of the logits, which then hold the gradient.

    ``memory`` is the tensor that owns the logits' memory, ``view`` how the logits lie in it:
    marking the owner dirty, and not a view of it, makes later uses of either pass through this
    node.
    """

    @staticmethod
    @_takes_all_arguments
    def forward(memory, view, target, weight, options: Options):
        """Return the memory, now the gradient for an upstream gradient of 1, and the loss."""
        logits = memory.as_strided(*view)
        return memory, _ops.forward_backward_(logits, target, weight, *options.for_forward())

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the gradient."""
        memory, ctx.view, target, _, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(memory)
        ctx.save_for_backward(memory, target)

    @staticmethod
    def backward(ctx, grad_memory, grad_loss):
        """Scale the gradient by the upstream one, once."""
        if grad_memory is not None:
            raise RuntimeError(
                "grad_in_forward must be False where the logits are used after the loss: they have "
                "been overwritten by their gradient"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("grad_in_forward must be False for create_graph=True")
        if grad_loss is None:
            return (None,) * 5
        memory, target = ctx.saved_tensors
        increment_version(memory)  # a second backward would scale twice: autograd refuses it
        gradient = memory.detach()
        _ops.scale_gradient_(gradient.as_strided(*ctx.view), grad_loss, target, *ctx.options[:2])
        return gradient, None, None, None, None
