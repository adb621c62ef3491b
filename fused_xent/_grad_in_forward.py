"""The mode ``grad_in_forward``: the forward writes the gradient over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._problem import Problem
from ._torch_private import below_autograd, is_batched_by_autograd, memory_of


def forward(problem: Problem) -> tuple[Any, ...]:
    """Return what ``_ops.forward`` does, but None for total_weight and state."""
    logits, *others = problem
    memory = memory_of(logits)
    view = (logits.size(), logits.stride(), logits.storage_offset())
    _, loss, *statistics = CrossEntropyGradInForward.apply(memory, view, *others)
    return loss, None, None, *statistics


class CrossEntropyGradInForward(torch.autograd.Function):
    """Loss and gradient in one read and one write of the logits, which then hold the gradient.

    ``memory`` is the base tensor of the logits, ``view`` their size, strides and offset in it. The
    base is marked dirty, not the view, so that later uses of either pass through this node.
    """

    @staticmethod
    def forward(ctx: Any, memory: Tensor, view: tuple[Any, ...], *inputs: Any) -> Any:
        """Return the memory, which holds the gradient for an upstream of 1, then the results.

        The other inputs are a Problem's, without logits.
        """
        problem = Problem(memory.as_strided(*view), *inputs)
        ctx.view, ctx.settings = view, problem.settings
        with below_autograd():
            results = _ops.forward_backward_(problem)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(memory)
        # Sparse labels leave no row out, so they are not needed.
        target = problem.target if problem.target_indices is None else None
        ctx.save_for_backward(memory, target, problem.token_weight)
        ctx.mark_non_differentiable(*results[3:])
        return memory, *results

    @staticmethod
    def backward(
        ctx: Any, grad_memory: Tensor | None, grad_loss: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Multiply the gradient by the upstream one, in place; this works once."""
        if any(grad is not None for grad in grads):
            raise RuntimeError(
                "grad_in_forward must be False where lse, z_loss or entropy are differentiated: "
                "their gradient needs the logits that are overwritten; use inplace_backward"
            )
        if grad_memory is not None:
            raise RuntimeError(
                "grad_in_forward must be False where the logits are used after the loss: they have "
                "been overwritten by their gradient"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("grad_in_forward must be False for create_graph=True")
        if is_batched_by_autograd(grad_loss):
            raise RuntimeError(
                "grad_in_forward must be False for is_grads_batched=True: there is room for one "
                "gradient in the logits' memory"
            )
        gradient = None
        if grad_loss is not None:
            memory, target, token_weight = ctx.saved_tensors
            gradient = memory.detach()  # shares the version, so a second backward raises an error
            logits = gradient.as_strided(*ctx.view)
            # In the place of a target, any floating-point tensor of this shape leaves no row out.
            target = logits if target is None else target
            rows = (target, token_weight, ctx.settings.dim, ctx.settings.ignore_index)
            with below_autograd():
                _ops.scale_gradient_(logits, grad_loss, *rows)
        return gradient, *[None] * len(Problem._fields)
