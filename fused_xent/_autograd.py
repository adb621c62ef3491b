"""The autograd Functions of the loss: the only place that knows what is saved for backward.

They serve twice: called by the functions that users call, and as the autograd formulas of the
operators, so that a graph of operators alone (torch.export, make_fx) has the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _formulas, _ops
from ._options import DEFAULTS, Settings
from ._problem import Problem, check_range, is_autocast
from ._torch_private import (
    apply_at_this_level,
    are_ordinary,
    below_autograd,
    is_batched_by_autograd,
    is_eager,
    is_jit_tracing,
    is_under_torch_func,
    is_under_vmap_or_jvp,
    memory_of,
)
from .reference import CrossEntropyStatistics

Tensors = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]
N_TENSORS = len(Problem._fields) - 1


def is_traced() -> bool:
    """Return True where operators go into a graph, which is to have their autograd formulas."""
    return torch.compiler.is_compiling() or is_jit_tracing() is not None


def needs_graph(*tensors: Tensor | None) -> bool:
    """Return True if a gradient of one of these is recorded."""
    return torch.is_grad_enabled() and any(map(_requires_grad, tensors))


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def evaluate(problem: Problem) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, and with statistics all of them."""
    *tensors, settings = problem
    if is_for_torch(problem):
        return _by_torch(problem)
    if is_traced():
        # Compiled code cannot tell whether the logits are used later, as grad_in_forward must.
        is_inplace = settings.inplace_backward or settings.grad_in_forward
        inplace = {"inplace_backward": True} if is_inplace else {}
        results = _wanted(_ops.forward(problem, **inplace))
    elif is_under_torch_func():
        results = _wanted(CrossEntropy.apply(*problem))
    elif not needs_graph(*tensors):
        results = _wanted(_forward(problem))
    elif settings.grad_in_forward and problem.logits.requires_grad:
        results = _grad_in_forward(problem)
    elif settings.statistics:
        results = CrossEntropyInEager.apply(*problem)
    else:
        return (CrossEntropyInEager.apply(*problem),)
    return complete(problem, *results) if settings.statistics else results


def is_plain(input: Any, target: Any, weight: Any, token_weight: Any, normalizer: Any) -> bool:
    """Return True for a call that needs no more checks than the operator's own.

    Class indices and logits alone, for the kernels, in eager mode: most calls. A small loss takes
    less time than the checks in Python do.
    """
    return (
        weight is token_weight is normalizer is None
        and is_eager()
        and isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and target.dtype is torch.int64
        and are_ordinary(input, target)
        and input.numel() > 0
        and _ops.has_kernels(input)
        and not is_autocast(input)
    )


def evaluate_plain(logits: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """Return the loss of what :func:`is_plain`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return PlainCrossEntropy.apply(logits, target, settings)
    return _ops.plain_loss(logits, target, settings)


def is_for_torch(problem: Problem) -> bool:
    """Return True if torch operations compute the loss: without kernels, or under transforms."""
    logits, *_, settings = problem
    return not _ops.has_kernels(logits) or logits.size(settings.dim) == 0 or is_under_vmap_or_jvp()


def _by_torch(problem: Problem) -> tuple[Tensor] | CrossEntropyStatistics:
    check_range(problem)
    results = _formulas.by_torch(problem)
    loss = results.loss.to(problem.settings.loss_dtype or problem.logits.dtype)
    return results._replace(loss=loss) if problem.settings.statistics else (loss,)


def complete(
    problem: Problem, loss: Tensor, lse: Tensor, entropy: Tensor, argmax: Tensor
) -> CrossEntropyStatistics:
    """Return all statistics, those that follow from the others as well."""
    _, target, _, token_weight, _, settings = problem
    z_loss = settings.of_operators.get("lse_square_scale", 0.0) * lse.square()
    if token_weight is not None:
        z_loss = z_loss * token_weight.masked_fill(argmax < 0, 0)
    if target.is_floating_point():
        target = target.argmax(settings.dim) if target.shape[settings.dim] else argmax
    correct = (argmax == target) & (argmax >= 0)
    return CrossEntropyStatistics(loss, lse, z_loss, entropy, argmax, correct)


def _wanted(results: Tensors) -> Any:
    """Return of the results of ``forward`` those that users see."""
    loss, _, _, *statistics = results
    return loss, *statistics


def _forward(problem: Problem) -> Tensors:
    with below_autograd():
        return _ops.forward(problem)


# Function.apply binds its arguments to forward's signature in every call, to fill in defaults.
# There are none, and *inputs is bound in no time, where the true signature takes longer than a
# small loss.


class CrossEntropy(torch.autograd.Function):
    """Loss in one read of the logits; gradient in one more read and one write.

    With ``inplace_backward`` the gradient overwrites the logits, once. That raises their version:
    autograd raises an error if a later backward, or a second one, needs the old values.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return what the operator does; the inputs are a Problem's."""
        return _forward(Problem(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Save the inputs and a few numbers a row; nothing else of the logits' size."""
        _save(ctx, Problem(*inputs), output)
        ctx.mark_non_differentiable(*output[1:3], *output[5:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> Grads:
        """Return the gradients of a Problem's tensors."""
        grad_lse, grad_entropy = grads[2:4] if ctx.settings.statistics else (None, None)
        return _backward(ctx, grad_loss, grad_lse, grad_entropy)


class CrossEntropyInEager(torch.autograd.Function):
    """The same, faster: returns what users see, and is for no transform and no compiler."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return the loss; with statistics, after it lse, entropy and argmax."""
        problem = Problem(*inputs)
        output = _forward(problem)
        _save(ctx, problem, output)
        if not problem.settings.statistics:
            return output[0]
        ctx.mark_non_differentiable(output[5])
        return output[0], *output[3:]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> Grads:
        """Return the gradients of a Problem's tensors."""
        grad_lse, grad_entropy = grads[:2] if grads else (None, None)
        return _backward(ctx, grad_loss, grad_lse, grad_entropy)


class PlainCrossEntropy(torch.autograd.Function):
    """The same of what :func:`is_plain`, which is most of the time of a small loss."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *inputs: Any) -> Tensor:
            """Return the loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return the loss; the inputs are logits, target and Settings."""
        logits, target, ctx.settings = inputs
        loss, total_weight, state = _ops.plain_forward(*inputs)
        ctx.save_for_backward(logits, target, total_weight, state)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Grads:
        """Return the gradient of the logits."""
        logits, target, total_weight, state = ctx.saved_tensors
        if not torch.is_grad_enabled() and is_eager() and are_ordinary(grad_loss, logits):
            gradient = _ops.plain_backward(
                logits, target, ctx.settings, total_weight, state, grad_loss
            )
            return gradient, None, None
        problem = Problem(logits, target, None, None, None, ctx.settings)
        needs = (True, False, False, False, False)
        upstream = (grad_loss, None, None)
        return _gradients(problem, upstream, needs, total_weight, state, None)[0], None, None


def _save(ctx: Any, problem: Problem, output: Tensors) -> None:
    *tensors, ctx.settings = problem
    _, total_weight, state, *statistics = output
    entropy = statistics[1] if statistics else None
    ctx.save_for_backward(*tensors, total_weight, state, entropy)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> Grads:
    """Return the gradients of a Problem's tensors, for upstream ones of loss, lse and entropy."""
    if all(map(_is_none, upstream)):
        return (None,) * (N_TENSORS + 1)
    *tensors, total_weight, state, entropy = ctx.saved_tensors
    problem, needs = Problem._make([*tensors, ctx.settings]), ctx.needs_input_grad[:-1]
    return *_gradients(problem, upstream, needs, total_weight, state, entropy), None


def _gradients(
    problem: Problem,
    upstream: Grads,
    needs: Sequence[bool],
    total_weight: Tensor,
    state: Tensor,
    entropy: Tensor | None,
) -> Sequence[Tensor | None]:
    needs_logits, *others = needs
    if torch.is_grad_enabled():
        return _gradients_with_graph(problem, upstream, needs, total_weight, state, entropy)
    of_others: list[Tensor | None]
    of_others = [None] * len(others)
    if any(others):
        of_others = _other_gradients(problem, upstream, others, total_weight, state)
    grad_logits = None  # last: it may overwrite the logits
    if needs_logits:
        grad_logits = _logits_gradient(problem, upstream, total_weight, state, entropy)
    return grad_logits, *of_others


def _is_none(grad: Tensor | None) -> bool:
    return grad is None  # == would ask the tensor


def _other_gradients(
    problem: Problem,
    upstream: Grads,
    needs: Sequence[bool],
    total_weight: Tensor,
    state: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of all tensors but the logits."""
    if any(needs[1:]) or "focal_gamma" in problem.settings.of_operators:
        return _formulas.gradients(problem, upstream, (False, *needs))[1:]
    grad_loss = upstream[0]
    if grad_loss is None:
        return [None] * len(needs)
    grad_target = _formulas.target_gradient(problem, state, total_weight, grad_loss)
    return [grad_target, None, None, None]


def _logits_gradient(
    problem: Problem, upstream: Grads, total_weight: Tensor, state: Tensor, entropy: Tensor | None
) -> Any:
    if not problem.settings.inplace_backward:
        with below_autograd():
            return _ops.backward(problem, upstream, total_weight, state, entropy)
    if any(map(is_batched_by_autograd, upstream)):
        raise RuntimeError(
            "inplace_backward must be False for is_grads_batched=True: there is room for one "
            "gradient in the logits' memory"
        )
    with below_autograd():
        _ops.backward(problem, upstream, total_weight, state, entropy, inplace=True)
    return problem.logits.detach()


def _gradients_with_graph(
    problem: Problem,
    upstream: Grads,
    needs: Sequence[bool],
    total_weight: Tensor,
    state: Tensor,
    entropy: Tensor | None,
) -> list[Tensor | None]:
    """Return gradients that can be differentiated: of the logits alone, by the kernels."""
    if problem.settings.inplace_backward:
        raise RuntimeError(
            "inplace_backward must be False for create_graph=True and for torch.func: a second "
            "derivative needs the logits that the first overwrites"
        )
    # A Function inside autograd's own vmap would return what no graph leads to.
    if any(needs[1:]) or any(map(is_batched_by_autograd, upstream)):
        return _formulas.gradients(problem, upstream, needs)
    of_mean = problem._replace(normalizer=total_weight)
    return [CrossEntropyBackward.apply(*of_mean, state, entropy, *upstream), None, None, None, None]


class CrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits by the kernels, its own derivatives by torch operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return the gradient of the logits.

        The inputs are a Problem's, with total_weight as its normalizer, state, entropy and the
        upstream gradients of loss, lse and entropy.
        """
        problem, (state, entropy, *upstream) = Problem(*inputs[:6]), inputs[6:]
        with below_autograd():
            return _ops.backward(problem, upstream, problem.normalizer, state, entropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save all of the inputs but state and entropy, which the formulas do not need."""
        *tensors, ctx.settings, _, _, grad_loss, grad_lse, grad_entropy = inputs
        ctx.save_for_backward(*tensors, grad_loss, grad_lse, grad_entropy)

    @staticmethod
    def backward(ctx: Any, grad_grad_logits: Tensor) -> Grads:
        """Return the gradients of the tensors and of the upstream gradients."""
        saved, settings = ctx.saved_tensors, ctx.settings
        of_tensors, of_upstream = ctx.needs_input_grad[:5], ctx.needs_input_grad[8:]
        needs = (*of_tensors, *of_upstream)
        variables = [tensor for tensor, needed in zip(saved, needs, strict=True) if needed]

        def gradient(*variables: Tensor) -> Tensor | None:
            given = iter(variables)
            *tensors, grad_loss, grad_lse, grad_entropy = (
                next(given) if needed else tensor
                for tensor, needed in zip(saved, needs, strict=True)
            )
            upstream = (grad_loss, grad_lse, grad_entropy)
            of_logits = (True, False, False, False, False)
            return _formulas.gradients(Problem._make([*tensors, settings]), upstream, of_logits)[0]

        _, vjp = torch.func.vjp(gradient, *variables)  # type: ignore[misc]
        found = iter(vjp(grad_grad_logits))
        grads = [next(found) if needed else None for needed in needs]
        return *grads[:5], None, None, None, *grads[5:]


class CrossEntropyGradInForward(torch.autograd.Function):
    """Loss and gradient in one read and one write of the logits, which then hold the gradient.

    ``memory`` is the tensor that owns the logits' memory, ``view`` how the logits lie in it:
    marking the owner dirty, and not a view of it, makes later uses of either pass through this
    node.
    """

    @staticmethod
    def forward(ctx: Any, memory: Tensor, view: tuple[Any, ...], *inputs: Any) -> Any:
        """Return the memory, now the gradient for an upstream of 1, and what users see.

        The further inputs are a Problem's, without logits.
        """
        problem = Problem(memory.as_strided(*view), *inputs)
        ctx.view, ctx.settings = view, problem.settings
        with below_autograd():
            results = _ops.forward_backward_(problem)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(memory)
        ctx.save_for_backward(memory, problem.target, problem.token_weight)
        if not ctx.settings.statistics:
            return memory, results
        ctx.mark_non_differentiable(results[-1])
        return memory, *results

    @staticmethod
    def backward(
        ctx: Any, grad_memory: Tensor | None, grad_loss: Tensor | None, *grads: Tensor | None
    ) -> Grads:
        """Scale the gradient by the upstream one, once."""
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
            gradient = memory.detach()  # of the same version: a second backward finds it changed
            logits = gradient.as_strided(*ctx.view)
            rows = (target, token_weight, ctx.settings.dim, ctx.settings.ignore_index)
            with below_autograd():
                _ops.scale_gradient_(logits, grad_loss, *rows)
        return gradient, *[None] * len(Problem._fields)


def _grad_in_forward(problem: Problem) -> Tensors:
    logits, *others = problem
    memory = memory_of(logits)
    view = (logits.size(), logits.stride(), logits.storage_offset())
    _, *results = CrossEntropyGradInForward.apply(memory, view, *others)
    return tuple(results)


# ---- the operators' formulas ---------------------------------------------------------------------


def problem_of(
    statistics: bool, *arguments: Any, inplace_backward: bool = False, **options: Any
) -> Problem:
    """Return the problem that an operator of a loss, or of its gradient, is given."""
    logits, target, weight, token_weight, normalizer, dim, reduction, *loss_dtype = arguments
    settings = Settings(
        dim,
        reduction,
        loss_dtype[0] if loss_dtype else None,
        statistics,
        options.get("ignore_index", DEFAULTS["ignore_index"]),  # type: ignore[arg-type]
        inplace_backward,
        False,
        options,
    )
    return Problem(logits, target, weight, token_weight, normalizer, settings)


def _forward_formula(*arguments: Any, statistics: bool = False, **options: Any) -> Any:
    problem = problem_of(statistics, *arguments, **options)
    if needs_graph(*problem[:-1]):
        return apply_at_this_level(CrossEntropy, *problem)
    return _forward(problem)


def _loss_formula(*arguments: Any, **options: Any) -> Any:
    return _forward_formula(*arguments, **options)[0]


def _backward_formula(*arguments: Any, **options: Any) -> Any:
    *of_problem, state, entropy, grad_loss, grad_lse, grad_entropy = arguments
    problem = problem_of(entropy is not None, *of_problem, **options)
    inputs = (*problem, state, entropy, grad_loss, grad_lse, grad_entropy)
    return apply_at_this_level(CrossEntropyBackward, *inputs)


if _ops.LOAD_ERROR is None:
    _ops.register_formula("loss", _loss_formula)
    _ops.register_formula("forward", _forward_formula)
    with_statistics = partial(_forward_formula, statistics=True)
    _ops.register_formula("forward_with_statistics", with_statistics)
    _ops.register_formula("backward", _backward_formula)
