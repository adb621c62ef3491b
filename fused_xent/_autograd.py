"""The autograd Functions of the loss, and what they save for the backward.

The public functions call them, and they are the autograd formulas of the operators: a graph of
operators (torch.export, make_fx) has the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _formulas, _grad_in_forward, _ops
from ._ops import saved_of
from ._options import DEFAULTS, Settings
from ._overwriting import check_overwritable
from ._problem import Problem, Saved, Upstream, check_range, is_autocast
from ._torch_private import (
    apply_at_this_level,
    apply_in_eager,
    are_ordinary,
    below_autograd,
    is_batched_by_autograd,
    is_eager,
    is_jit_tracing,
    is_under_torch_func,
    is_under_vmap_or_jvp,
    overwritable,
    unwrap_dead_wrappers,
)
from .reference import CrossEntropyStatistics

Tensors = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]
N_TENSORS = len(Problem._fields) - 1
NO_OTHERS = (False,) * (N_TENSORS - 1)  # gradients of the tensors beside the logits


def is_traced() -> bool:
    """Return True if a compiler or torch.jit.trace records the operators in a graph."""
    return torch.compiler.is_compiling() or is_jit_tracing() is not None


def needs_graph(*tensors: Tensor | None) -> bool:
    """Return True if autograd records operations on one of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def evaluate(problem: Problem) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics."""
    *tensors, settings = problem
    check_overwritable(problem)
    if is_for_torch(problem):
        return _by_torch(problem)
    if is_traced():
        # A graph cannot check that nothing uses the logits later, so grad_in_forward is not used.
        is_inplace = settings.inplace_backward or settings.grad_in_forward
        inplace = {"inplace_backward": True} if is_inplace else {}
        results = _ops.forward(problem, **inplace)
    elif settings.grad_in_forward and needs_graph(problem.logits):
        results = _grad_in_forward.forward(problem)
    elif is_under_torch_func():
        results = CrossEntropy.apply(*problem)
    elif needs_graph(*tensors):
        results = apply_in_eager(CrossEntropy, *unwrap_dead_wrappers(problem))
    else:
        results = _forward(problem)
    loss, _, _, *statistics = results
    return complete(problem, loss, *statistics) if settings.statistics else (loss,)


def is_plain(
    input: Any,
    target: Any,
    weight: Any,
    token_weight: Any,
    normalizer: Any,
    target_indices: Any,
) -> bool:
    """Return True for a plain call: class indices and logits alone, in eager mode, with kernels.

    The operator's own checks suffice there. Checks in Python take longer than a small loss.
    """
    return (
        weight is token_weight is normalizer is target_indices is None
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
    """Return the loss of a plain call."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return apply_in_eager(PlainCrossEntropy, logits, target, settings)  # type: ignore[no-any-return]
    return _ops.plain_loss(logits, target, settings)


def is_for_torch(problem: Problem) -> bool:
    """Return True if torch operations compute the loss: no kernels, no classes, or a transform."""
    logits, *_, settings = problem
    return not _ops.has_kernels(logits) or logits.size(settings.dim) == 0 or is_under_vmap_or_jvp()


def _by_torch(problem: Problem) -> tuple[Tensor] | CrossEntropyStatistics:
    check_range(problem)
    results = _formulas.by_torch(problem)
    loss = results.loss.to(problem.settings.loss_dtype or problem.logits.dtype)
    return results._replace(loss=loss) if problem.settings.statistics else (loss,)


def complete(
    problem: Problem,
    loss: Tensor,
    lse: Tensor,
    entropy: Tensor,
    argmax: Tensor,
    label: Tensor | None = None,
) -> CrossEntropyStatistics:
    """Return all statistics: compute z_loss and correct from the others.

    ``label`` is the class of each row's greatest probability; None: the problem has all classes.
    """
    _, target, _, token_weight, _, target_indices, settings = problem
    z_loss = settings.of_operators.get("lse_square_scale", 0.0) * lse.square()
    if token_weight is not None:
        z_loss = z_loss * token_weight.masked_fill(argmax < 0, 0)
    if label is not None:
        target = label
    elif target_indices is not None:
        target = _formulas.top_label(problem, problem.logits.shape[settings.dim])
    elif target.is_floating_point():
        target = target.argmax(settings.dim) if target.shape[settings.dim] else argmax
    correct = (argmax == target) & (argmax >= 0)
    return CrossEntropyStatistics(loss, lse, z_loss, entropy, argmax, correct)


def _forward(problem: Problem) -> Tensors:
    with below_autograd():
        return _ops.forward(problem)


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
        """Save the inputs and a few numbers per row; nothing else of the logits' size."""
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors, *saved_of(output))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:3], *output[5:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> Grads:
        """Return the gradients of a Problem's tensors."""
        upstream = Upstream(grad_loss, *(grads[2:4] or (None, None)))
        if all(grad is None for grad in upstream):
            return (None,) * (N_TENSORS + 1)
        *tensors, total_weight, state, entropy = ctx.saved_tensors
        problem = Problem._make([*tensors, ctx.settings])
        saved = Saved(total_weight, state, entropy)
        return *_gradients(problem, saved, upstream, ctx.needs_input_grad[:-1]), None


class PlainCrossEntropy(torch.autograd.Function):
    """The same for a plain call. It saves less, which is faster."""

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
            of_rows = (total_weight, state, grad_loss)
            return _ops.plain_backward(logits, target, *of_rows, ctx.settings), None, None
        problem = Problem(logits, target, None, None, None, None, ctx.settings)
        saved, upstream = Saved(total_weight, state, None), Upstream(grad_loss, None, None)
        return logits_gradient(problem, saved, upstream), None, None


def _gradients(
    problem: Problem, saved: Saved, upstream: Upstream, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return the gradients of a Problem's tensors."""
    needs_logits, *others = needs
    if torch.is_grad_enabled():
        return _gradients_with_graph(problem, saved, upstream, needs)
    of_others = _other_gradients(problem, saved, upstream, others)
    # Last: it may overwrite the logits.
    return _logits_gradient(problem, saved, upstream) if needs_logits else None, *of_others


def logits_gradient(problem: Problem, saved: Saved, upstream: Upstream) -> Tensor:
    """Return the gradient of the logits, differentiable where grad mode is on."""
    gradient: Any = _gradients(problem, saved, upstream, (True, *NO_OTHERS))[0]
    return gradient  # type: ignore[no-any-return]


def _other_gradients(
    problem: Problem, saved: Saved, upstream: Upstream, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of all tensors but the logits."""
    if any(needs[1:]) or (needs[0] and "focal_gamma" in problem.settings.of_operators):
        return _formulas.gradients(problem, upstream, (False, *needs))[1:]
    grad_target = None
    if needs[0] and upstream.loss is not None:
        grad_target = _formulas.target_gradient(problem, saved, upstream.loss)
    return [grad_target, *[None] * (N_TENSORS - 2)]


def _logits_gradient(problem: Problem, saved: Saved, upstream: Upstream) -> Tensor:
    is_inplace = problem.settings.inplace_backward
    if is_inplace and any(map(is_batched_by_autograd, (problem.target, *upstream))):
        raise RuntimeError(
            "inplace_backward must be False for is_grads_batched=True: there is room for one "
            "gradient in the logits' memory"
        )
    logits = overwritable(problem.logits) if is_inplace else None
    with below_autograd():
        if logits is None:
            return _ops.backward(problem, saved, upstream)
        _ops.backward_(problem._replace(logits=logits), saved, upstream)
    return logits.detach()


def _gradients_with_graph(
    problem: Problem, saved: Saved, upstream: Upstream, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated: of the logits alone, by the kernels."""
    if problem.settings.inplace_backward:
        raise RuntimeError(
            "inplace_backward must be False for create_graph=True and for torch.func: a second "
            "derivative needs the logits that the first overwrites"
        )
    # Inside autograd's own vmap, the result of a Function would have no graph.
    if any(needs[1:]) or any(map(is_batched_by_autograd, (problem.target, *upstream))):
        return _formulas.gradients(problem, upstream, needs)
    of_mean = problem._replace(normalizer=saved.total_weight)
    grad_logits = CrossEntropyBackward.apply(*of_mean, saved.state, saved.entropy, *upstream)
    return [grad_logits, *[None] * (N_TENSORS - 1)]


class CrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits, by the kernels. Torch operations compute its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return the gradient of the logits.

        The inputs are a Problem's, with total_weight as its normalizer, state, entropy and the
        fields of Upstream.
        """
        *of_problem, state, entropy, grad_loss, grad_lse, grad_entropy = inputs
        problem, upstream = Problem._make(of_problem), Upstream(grad_loss, grad_lse, grad_entropy)
        saved = Saved(problem.normalizer, state, entropy)
        with below_autograd():
            return _ops.backward(problem, saved, upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save all of the inputs but state and entropy, which the formulas do not need."""
        *tensors, ctx.settings, _, _, grad_loss, grad_lse, grad_entropy = inputs
        ctx.save_for_backward(*tensors, grad_loss, grad_lse, grad_entropy)

    @staticmethod
    def backward(ctx: Any, grad_grad_logits: Tensor) -> Grads:
        """Return the gradients of the tensors and of the upstream gradients."""

        def gradient(*inputs: Any) -> Any:
            *tensors, grad_loss, grad_lse, grad_entropy = inputs
            problem = Problem._make([*tensors, ctx.settings])
            upstream = Upstream(grad_loss, grad_lse, grad_entropy)
            return _formulas.gradients(problem, upstream, (True, *NO_OTHERS))[0]

        needs = (*ctx.needs_input_grad[:N_TENSORS], *ctx.needs_input_grad[N_TENSORS + 3 :])
        grads = _formulas.pull_back(gradient, ctx.saved_tensors, needs, grad_grad_logits)
        return *grads[:N_TENSORS], None, None, None, *grads[N_TENSORS:]


# ---- the operators' formulas ---------------------------------------------------------------------


def problem_of(
    statistics: bool, *arguments: Any, inplace_backward: bool = False, **options: Any
) -> Problem:
    """Return the problem made of an operator's arguments."""
    *tensors, dim, reduction = arguments[:7]
    # The dispatcher passes no arguments that are at their defaults, after the last one that is not.
    loss_dtype, target_indices, *_ = (*arguments[7:], None, None)
    settings = Settings(
        dim,
        reduction,
        loss_dtype,
        statistics,
        options.get("ignore_index", DEFAULTS["ignore_index"]),  # type: ignore[arg-type]
        inplace_backward,
        False,
        options,
    )
    return Problem._make([*tensors, target_indices, settings])


def of_backward(*arguments: Any, **options: Any) -> tuple[Problem, Saved, Upstream]:
    """Return what the operators of the gradient are called with, total_weight as normalizer too."""
    *of_problem, state, entropy, grad_loss, grad_lse, grad_entropy = arguments[:12]
    problem = problem_of(entropy is not None, *of_problem, None, *arguments[12:], **options)
    saved = Saved(problem.normalizer, state, entropy)
    return problem, saved, Upstream(grad_loss, grad_lse, grad_entropy)


def _forward_formula(*arguments: Any, statistics: bool = False, **options: Any) -> Any:
    problem = problem_of(statistics, *arguments, **options)
    if needs_graph(*problem[:-1]):
        check_overwritable(problem)
        return apply_at_this_level(CrossEntropy, *problem)
    return _forward(problem)


def _loss_formula(*arguments: Any, **options: Any) -> Any:
    return _forward_formula(*arguments, **options)[0]


def _backward_formula(*arguments: Any, **options: Any) -> Any:
    problem, saved, upstream = of_backward(*arguments, **options)
    return apply_at_this_level(CrossEntropyBackward, *problem, *saved[1:], *upstream)


if _ops.LOAD_ERROR is None:
    _ops.register_formula("loss", _loss_formula)
    _ops.register_formula("forward", _forward_formula)
    with_statistics = partial(_forward_formula, statistics=True)
    _ops.register_formula("forward_with_statistics", with_statistics)
    _ops.register_formula("backward", _backward_formula)
